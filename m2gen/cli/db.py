"""The commands of ``m2gen db`` that only read the tuning database, and the group itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m2gen.cli.complete import complete_asked, complete_device, complete_spec, complete_target
from m2gen.cli.learn import EPILOG, learn
from m2gen.cli.options import (
    DbOption,
    DebugOption,
    IdArgument,
    JsonOption,
    OptionalSpecOption,
    examples,
    reporting,
    warn_of_faults,
)
from m2gen.cli.upkeep import POLICY, contribute, export, import_, merge, prune, replay, verify
from m2gen.errors import UsageError
from m2gen.spec import Objective

db_app = typer.Typer(
    no_args_is_help=True,
    help="Look after the tuning database of measured, verified schedules.",
    epilog="A record is a line of DB/<arch>/<device>/<variant>.jsonl, named by its id or the first digits of that.",
)


@db_app.command("list")
def list_(
    db: DbOption = None,
    spec: Annotated[
        str | None,
        typer.Option("--spec", help="Only records of this spec's layers.", autocompletion=complete_spec),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also schedules that are known to fail.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List records: the calls that each serves, its speed, and whether it is stale."""
    from m2gen.cli.show.db import show_list
    from m2gen.pipeline import open_database

    with reporting(debug):
        database = open_database(db)
        show_list(database, warn_of_faults(database.contents()), spec, everything=everything, as_json=json)


@db_app.command()
def show(identity: IdArgument, db: DbOption = None, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show all fields of one record."""
    from m2gen.cli.show.db import show_record
    from m2gen.pipeline import open_database

    with reporting(debug):
        show_record(open_database(db).find(identity), as_json=json)


@db_app.command(
    epilog=examples(
        "m2gen db why m2rnn_7b --spec h200.yaml --batch 4",
        'm2gen db why m2rnn_7b --spec h200.yaml --device "NVIDIA H200"',
    )
)
def why(
    name: Annotated[
        str,
        typer.Argument(
            metavar="LAYER|VARIANT", help="A layer of --spec, or a variant's key.", autocompletion=complete_asked
        ),
    ],
    spec: OptionalSpecOption = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Sequences of the call; any number if not given.")
    ] = None,
    seq: Annotated[int | None, typer.Option("--seq", min=1, help="Steps of the call, which play no part.")] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="GPU by its product name, as records have it.", autocompletion=complete_device),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", help="Architecture, where no --device is named.", autocompletion=complete_target),
    ] = None,
    objective: Annotated[
        Objective | None, typer.Option("--objective", help="What was made fast, in place of the spec's.")
    ] = None,
    db: DbOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Explain which record serves a call, and why no other record of the variant does."""
    from m2gen import pipeline
    from m2gen.cli.show.db import show_why

    with reporting(debug):
        database = pipeline.open_database(db)
        warn_of_faults(database.contents())
        question = pipeline.Question(name, spec, objective, batch, target, device)
        show_why(pipeline.why(database, question), spec, batch, seq, as_json=json)


@db_app.command()
def diff(
    one: Annotated[str, typer.Argument(metavar="A", help="A record, a database or an export.")],
    other: Annotated[str, typer.Argument(metavar="B", help="Another of the same.")],
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


db_app.command(epilog=POLICY)(merge)
db_app.command()(prune)
db_app.command()(export)
db_app.command(epilog=examples("m2gen db contribute b200.jsonl --db mine   # needs a GPU's records in mine"))(
    contribute
)
db_app.command("import", epilog=POLICY)(import_)
db_app.command()(verify)
db_app.command()(replay)
db_app.command(epilog=EPILOG)(learn)
