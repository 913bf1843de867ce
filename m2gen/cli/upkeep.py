"""The commands of ``m2gen db`` that merge, remove, check or measure records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m2gen.cli.complete import complete_record
from m2gen.cli.options import (
    DbOption,
    DebugOption,
    IdArgument,
    JsonOption,
    QuietOption,
    reporting,
    terminal_progress,
    warn_of_faults,
)
from m2gen.errors import DatabaseError, UsageError

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")]
POLICY = (
    "Of two records of the same calls, environment and problem, the one stays whose kernels are still rendered; then "
    "the one whose confidence interval ends lower, in milliseconds; then the default schedule; then the smaller id. "
    "Whatever the order of merging, the files are the same."
)


def merge(
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another database, or an export.")],
    db: DbOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Add another database's records to this one's."""
    from m2gen.cli.show.upkeep import show_change
    from m2gen.db import read_other
    from m2gen.pipeline import open_database

    with reporting(debug):
        show_change(open_database(db, new=True).add(read_other(other)), as_json=json)


def prune(
    db: DbOption = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="Also failures, whose schedules are then tried again.")
    ] = False,
    unreadable: Annotated[bool, typer.Option("--unreadable", help="Also lines that are not records.")] = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove records that can serve nothing any more: stale, outranked, or of kernels that failed since."""
    from m2gen import pipeline
    from m2gen.cli.show.upkeep import show_pruned

    with reporting(debug):
        database = pipeline.open_database(db)
        contents = database.contents()
        found = pipeline.superfluous(contents.records, failed=failed)
        if not dry_run:
            database.remove(item.record.id for item in found)
            if unreadable:
                database.drop_faults()
        show_pruned(found, contents.faults if unreadable else (), dry_run=dry_run, as_json=json)


def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write, which is replaced if it is there.")],
    db: DbOption = None,
    debug: DebugOption = False,
) -> None:
    """Write all records to one file, which `m2gen db import` reads."""
    from m2gen.cli.show.names import counted
    from m2gen.db import write_export
    from m2gen.pipeline import open_database

    with reporting(debug):
        records = warn_of_faults(open_database(db).contents())
        write_export(file, records)
        print(f"{file}: {counted(len(records), 'record')}")


def contribute(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write, which `m2gen db import` reads.")],
    db: DbOption = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="Database that it is for, in place of the one that ships with m2gen.")
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the records of --db that are worth giving to others, without your host's name, and say what they change."""
    from m2gen.cli.show.contribute import show_contribution
    from m2gen.db import write_export
    from m2gen.pipeline import contribution, open_database

    with reporting(debug):
        theirs = open_database(to).records()
        mine = open_database(db)
        if mine.root.resolve() == open_database(to).root.resolve():
            raise UsageError(f"--db must be another database than the one to give to, got {mine.root} for both")
        found = contribution(warn_of_faults(mine.contents()), theirs)
        if not found.records:
            reasons = [f"{item.record.id}: {item.reason}" for item in found.kept]
            raise DatabaseError("\n".join([f"{mine.root} must hold a record to give, got none", *reasons]))
        write_export(file, found.records)
        show_contribution(file, found, as_json=json)


def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="File that `m2gen db export` wrote; it need not be trusted.")
    ],
    db: DbOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Add the records of a file; nothing is written unless all of them are valid."""
    from m2gen.cli.show.upkeep import show_change
    from m2gen.db import read_export
    from m2gen.pipeline import open_database

    with reporting(debug):
        show_change(open_database(db, new=True).add(read_export(file)), as_json=json)


def verify(
    identities: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID]...", help="Records; all winners of this GPU if none.", autocompletion=complete_record
        ),
    ] = None,
    db: DbOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Verify records against float64 again on this GPU; one that fails serves no build any more, and exits 1."""
    from m2gen import pipeline
    from m2gen.cli.show.upkeep import show_rechecks

    with reporting(debug):
        database = pipeline.open_database(db)
        warn_of_faults(database.contents())
        context = pipeline.this_tuning_context("m2gen db verify")
        found = pipeline.verify_records(database, identities or (), context, terminal_progress(quiet or json))
        raise typer.Exit(show_rechecks(found, as_json=json))


def replay(
    identity: IdArgument,
    db: DbOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure one record again on this GPU, in alternation with the default schedule."""
    from m2gen import pipeline
    from m2gen.cli.show.upkeep import show_replay

    with reporting(debug):
        record = pipeline.open_database(db).find(identity)
        context = pipeline.this_tuning_context("m2gen db replay")
        show_replay(pipeline.replay(record, context, terminal_progress(quiet or json)), as_json=json)
