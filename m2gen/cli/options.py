"""Options that several commands share, and how every command reports what goes wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m2gen.errors import M2genError, SpecError

if TYPE_CHECKING:
    from m2gen.cli.show.report import TerminalProgress
    from m2gen.db import Contents, Record


def examples(*commands: str) -> str:
    """Return what a command's help ends with."""
    return "\n".join(["Examples:", *(f"  {command}" for command in commands)])


SpecOption = Annotated[
    str, typer.Option("--spec", help="Spec file: as given, else in specs/, else among those shipped.")
]
OptionalSpecOption = Annotated[
    str | None, typer.Option("--spec", help="Spec file, as for every command; --check alone takes every package's own.")
]
LayersOption = Annotated[list[str] | None, typer.Option("--layer", help="Only this layer; may be repeated.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, and no tables but results.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of what is built instead of generated/, or dist/ for wheels and Hub kernels."),
]
TargetOption = Annotated[str | None, typer.Option("--target", help="Comma-separated arches instead of the spec's.")]
DbOption = Annotated[
    Path | None,
    typer.Option("--db", envvar="M2GEN_TUNING_DB", help="Folder of the tuning database instead of the shipped one."),
]
NoDbOption = Annotated[bool, typer.Option("--no-db", help="No records: default schedules everywhere.")]


@contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Turn errors into one line each on standard error and an exit status."""
    try:
        yield
    except typer.Exit:
        raise
    except M2genError as error:
        if debug:
            raise
        for line in str(error).splitlines():
            print(f"m2gen: {line}" if not isinstance(error, SpecError) else line, file=sys.stderr)
        raise typer.Exit(error.exit_status) from None
    except Exception as error:
        if debug:
            raise
        kind = "" if isinstance(error, OSError) else f"unexpected {type(error).__name__}, which --debug locates: "
        print(f"m2gen: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("m2gen: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


def terminal_progress(quiet: bool) -> TerminalProgress:
    """Return what shows progress, or with ``quiet`` none."""
    from m2gen.cli.show.report import TerminalProgress

    return TerminalProgress(quiet=quiet)


def warn_of_faults(contents: Contents) -> tuple[Record, ...]:
    """Return the records, after a line on standard error for each line that is none."""
    for fault in contents.faults:
        print(f"m2gen: warning: not used: {fault}", file=sys.stderr)
    return contents.records


def records_of(db: Path | None, no_db: bool) -> tuple[Record, ...]:
    """Return the records that builds look at."""
    from m2gen.pipeline import open_database

    if no_db:
        return ()
    return warn_of_faults(open_database(db).contents())
