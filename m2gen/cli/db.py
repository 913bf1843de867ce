"""``m2gen db``: look at the tuning database, explain it, and move records in and out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m2gen.cli.options import (
    DbOption,
    DebugOption,
    JsonOption,
    QuietOption,
    reporting,
    terminal_progress,
    warn_of_faults,
)
from m2gen.errors import UsageError
from m2gen.spec import Objective

db_app = typer.Typer(
    no_args_is_help=True,
    help="The tuning database: records of measured, verified schedules, a line each in "
    "DB/<arch>/<device>/<variant>.jsonl. Ids may be shortened to what names one record.",
)
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Of a record, or its first digits.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")]
POLICY = (
    "Of two records of one key, environment and problem, the one stays whose kernels are still rendered; then that "
    "whose confidence interval ends lower, as a part of the default's time; then the default schedule; then the "
    "smaller id. Whatever the order of merging, the files are the same."
)


@db_app.command("list")
def list_(
    db: DbOption = None,
    spec: Annotated[str | None, typer.Option("--spec", help="Only records of this spec's layers.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also schedules that are known to fail.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List records: what each serves, how fast it was, and whether it is stale, flagged or a failure."""
    from m2gen.cli.show.db import show_list
    from m2gen.pipeline import open_database

    with reporting(debug):
        database = open_database(db)
        show_list(database, warn_of_faults(database.contents()), spec, everything=everything, as_json=json)


@db_app.command()
def show(identity: IdArgument, db: DbOption = None, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show everything that one record says."""
    from m2gen.cli.show.db import show_record
    from m2gen.pipeline import open_database

    with reporting(debug):
        show_record(open_database(db).find(identity), as_json=json)


@db_app.command()
def why(
    name: Annotated[str, typer.Argument(metavar="LAYER|VARIANT", help="A layer of --spec, or a variant's key.")],
    spec: Annotated[str | None, typer.Option("--spec", help="Spec file, as for every command.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Sequences; every bucket if left out.")] = None,
    seq: Annotated[int | None, typer.Option("--seq", min=1, help="Steps, which change no bucket.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Product name, as records have it.")] = None,
    target: Annotated[str | None, typer.Option("--target", help="Arch, where no --device is named.")] = None,
    objective: Annotated[Objective | None, typer.Option("--objective", help="Instead of the spec's.")] = None,
    db: DbOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Explain which record serves a call, by which tier, and what disqualified every other record of the variant."""
    from m2gen import pipeline
    from m2gen.cli.show.db import show_why

    with reporting(debug):
        database = pipeline.open_database(db)
        warn_of_faults(database.contents())
        question = pipeline.Question(name, spec, objective, batch, target, device)
        show_why(pipeline.why(database, question), spec, batch, seq, as_json=json)


@db_app.command()
def diff(
    one: Annotated[str, typer.Argument(metavar="A", help="Record, database or export.")],
    other: Annotated[str, typer.Argument(metavar="B", help="Record, database or export.")],
    db: DbOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare two records field by field, or two databases record by record; exit 1 if they differ."""
    from m2gen.cli.show.db import show_differing_records, show_record_difference
    from m2gen.db import read_other
    from m2gen.pipeline import open_database

    with reporting(debug):
        if Path(one).exists() and Path(other).exists():
            status = show_differing_records(read_other(Path(one)), read_other(Path(other)), as_json=json)
        elif Path(one).exists() or Path(other).exists():
            raise UsageError(f"A and B must both be records, or both files or folders, got {one} and {other}")
        else:
            database = open_database(db)
            status = show_record_difference(database.find(one), database.find(other), as_json=json)
        raise typer.Exit(status)


@db_app.command(epilog=POLICY)
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


@db_app.command()
def prune(
    db: DbOption = None,
    failed: Annotated[bool, typer.Option("--failed", help="Also failures, so that they are tried again.")] = False,
    unreadable: Annotated[bool, typer.Option("--unreadable", help="Also lines that are no records.")] = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove records that can serve nothing any more: stale, outdone by another, or of kernels that failed since."""
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


@db_app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="To write, replacing what is there.")],
    db: DbOption = None,
    debug: DebugOption = False,
) -> None:
    """Write all records to one file of lines, which `m2gen db import` takes."""
    from m2gen.db import write_export
    from m2gen.pipeline import open_database

    with reporting(debug):
        records = warn_of_faults(open_database(db).contents())
        write_export(file, records)
        print(f"{file}: {len(records)} records")


@db_app.command("import", epilog=POLICY)
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Written by `m2gen db export`; it need not be trusted.")],
    db: DbOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Add the records of a file, all of which must be valid, or nothing is written."""
    from m2gen.cli.show.upkeep import show_change
    from m2gen.db import read_export
    from m2gen.pipeline import open_database

    with reporting(debug):
        show_change(open_database(db, new=True).add(read_export(file)), as_json=json)


@db_app.command()
def verify(
    identities: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Records; all winners of this device if none.")
    ] = None,
    db: DbOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Hold records against float64 again on this GPU; one that fails serves no build from then on, and exits 1."""
    from m2gen import pipeline
    from m2gen.cli.show.upkeep import show_rechecks

    with reporting(debug):
        database = pipeline.open_database(db)
        warn_of_faults(database.contents())
        rig = pipeline.this_rig("m2gen db verify")
        found = pipeline.verify_records(database, identities or (), rig, terminal_progress(quiet or json))
        raise typer.Exit(show_rechecks(found, as_json=json))


@db_app.command()
def replay(
    identity: IdArgument,
    db: DbOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Run one record's measurement again on this GPU, in turns with the default schedule."""
    from m2gen import pipeline
    from m2gen.cli.show.upkeep import show_replay

    with reporting(debug):
        record = pipeline.open_database(db).find(identity)
        rig = pipeline.this_rig("m2gen db replay")
        show_replay(pipeline.replay(record, rig, terminal_progress(quiet or json)), as_json=json)
