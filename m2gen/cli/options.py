"""Options that several commands share, and the reporting of errors in every command."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2gen.cli.complete import complete_layer, complete_record, complete_spec, complete_target
from m2gen.cli.streams import reader_is_gone
from m2gen.errors import M2genError, SpecError, listed

if TYPE_CHECKING:
    from m2gen.cli.show.report import TerminalProgress
    from m2gen.db import Contents, Record
    from m2gen.pipeline import Plan

DATABASE, OUTPUT = "Tuning database", "Output"
"""Titles of option groups in a command's help."""


def examples(*commands: str) -> str:
    """Return the examples at the end of a command's help."""
    return "\n".join(["Examples:", *(f"  {command}" for command in commands)])


def _spec_option() -> Any:
    text = "Spec file: as given, else in specs/, else among those shipped."
    return typer.Option("--spec", help=text, autocompletion=complete_spec)


SpecOption = Annotated[str, _spec_option()]
OptionalSpecOption = Annotated[str | None, _spec_option()]
LayersOption = Annotated[
    list[str] | None,
    typer.Option("--layer", help="Only this layer; may be repeated.", autocompletion=complete_layer),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target", help="Comma-separated architectures, in place of the spec's.", autocompletion=complete_target
    ),
]
IdArgument = Annotated[
    str, typer.Argument(metavar="ID", help="A record's id, or its first digits.", autocompletion=complete_record)
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Folder to build into: generated/ if not given, dist/ for wheels and Hub kernels."),
]
DbOption = Annotated[
    Path | None,
    typer.Option(
        "--db",
        envvar="M2GEN_TUNING_DB",
        help="Folder of the tuning database, in place of the one that ships with m2gen.",
        rich_help_panel=DATABASE,
    ),
]
NoDbOption = Annotated[
    bool, typer.Option("--no-db", help="Use no records: default schedules everywhere.", rich_help_panel=DATABASE)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document in place of tables.", rich_help_panel=OUTPUT)
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show only results: neither progress nor tables.", rich_help_panel=OUTPUT)
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Show more, such as variants' keys and schedules' slugs.", rich_help_panel=OUTPUT
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)]


@contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Print errors as one line each on standard error, and exit with their status."""
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
        if debug or (isinstance(error, BrokenPipeError) and reader_is_gone()):
            raise
        kind = "" if isinstance(error, OSError) else f"unexpected {type(error).__name__}, which --debug locates: "
        print(f"m2gen: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("m2gen: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


def terminal_progress(quiet: bool) -> TerminalProgress:
    """Return the progress on standard error, which shows nothing if ``quiet``."""
    from m2gen.cli.show.report import TerminalProgress

    return TerminalProgress(quiet=quiet)


def warn_of_faults(contents: Contents) -> tuple[Record, ...]:
    """Return the records, and warn on standard error of lines that are not records."""
    for line in listed(f"not used: {fault}" for fault in contents.faults):
        print(f"m2gen: warning: {line}", file=sys.stderr)
    return contents.records


def typed(ctx: typer.Context, name: str) -> bool:
    """Return whether an option was given on the command line, and not by the environment."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def records_of(db: Path | None, no_db: bool) -> tuple[Record, ...]:
    """Return the records for builds: those of ``db`` or the shipped database, none with ``no_db``."""
    from m2gen.pipeline import open_database

    if no_db:
        return ()
    return warn_of_faults(open_database(db).contents())


def planned(spec: str, target: str | None = None, *, records: Iterable[Record] = ()) -> Plan:
    """Return the plan of a spec, for the targets of --target or its own."""
    from m2gen.pipeline import plan

    return plan(spec, None if target is None else target.split(","), records)


def database_options(db: Path | None, no_db: bool) -> list[str]:
    """Return the options that give the same records to another command."""
    return ["--no-db"] if no_db else [] if db is None else ["--db", str(db)]


def plan_options(spec: str, db: Path | None, no_db: bool) -> str:
    """Return the options, quoted for a shell, that give the same plan to another command."""
    return shlex.join(["--spec", spec, *database_options(db, no_db)])
