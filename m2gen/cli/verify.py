"""The command ``m2gen verify`` and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m2gen.cli.complete import complete_variant
from m2gen.cli.files import check_output
from m2gen.cli.options import (
    OUTPUT,
    DbOption,
    DebugOption,
    JsonOption,
    NoDbOption,
    OptionalSpecOption,
    QuietOption,
    VerboseOption,
    examples,
    plan_options,
    planned,
    records_of,
    reporting,
    terminal_progress,
    typed,
)
from m2gen.errors import UsageError

LARGEST_SEED = 2**63 - 1
"""The largest integer that torch takes as a seed is twice that; cases add to theirs."""
EXAMPLES = examples(
    "m2gen verify --spec h100.yaml",
    "m2gen verify --spec tiny.yaml --quick --junit report.xml",
    "m2gen verify --full   # needs a GPU",
    "m2gen verify --full --feature layer --feature packed   # needs a GPU",
)


def verify(
    ctx: typer.Context,
    spec: OptionalSpecOption = None,
    full: Annotated[
        bool, typer.Option("--full", help="Every case of the shipped matrix, without --spec; needs a GPU.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="The first case of every variant, and one of every feature.")
    ] = False,
    variant: Annotated[
        str | None, typer.Option("--variant", help="Only this variant, by its key.", autocompletion=complete_variant)
    ] = None,
    feature: Annotated[
        list[str] | None, typer.Option("--feature", help="Only cases of this part of the contract; may be repeated.")
    ] = None,
    case: Annotated[str | None, typer.Option("--case", help="Only this case.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=-(2**63), max=LARGEST_SEED, help="Seed of the random inputs.")] = 0,
    db: DbOption = None,
    no_db: NoDbOption = False,
    json: JsonOption = False,
    junit: Annotated[
        Path | None, typer.Option("--junit", help="Also write JUnit XML to this file.", rich_help_panel=OUTPUT)
    ] = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare every output and gradient with a float64 reference: on the GPU, else in Triton's interpreter."""
    from m2gen import pipeline
    from m2gen.cli.show.verify import show_verify, write_junit

    with reporting(debug):
        if full == (spec is not None) or (full and quick):
            raise UsageError("verify must be given --spec, with or without --quick, or --full alone")
        if full and (no_db or (db is not None and typed(ctx, "db"))):
            raise UsageError("--db and --no-db must be given with --spec: the full matrix says which schedules it has")
        check_output("--junit", junit)
        options = "" if spec is None else plan_options(spec, db, no_db)
        request = pipeline.VerifyRequest(variant, case, tuple(feature or ()), seed, quick, options)
        progress = terminal_progress(quiet)
        if spec is None:
            outcome = pipeline.verify_full(request, progress)
        else:
            outcome = pipeline.verify(planned(spec, records=records_of(db, no_db)), request, progress)
        status = show_verify(outcome, as_json=json, quiet=quiet, verbose=verbose)
        if junit is not None:
            write_junit(junit, f"m2gen verify {'--full' if spec is None else spec}", outcome)
        raise typer.Exit(status)
