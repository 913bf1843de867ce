"""``m2gen bench``: its options, and what they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m2gen.bench.kinds import Axis, Kind
from m2gen.cli.options import (
    DbOption,
    DebugOption,
    JsonOption,
    NoDbOption,
    QuietOption,
    SpecOption,
    records_of,
    reporting,
    terminal_progress,
)
from m2gen.errors import UsageError

FIGURES = (".png", ".svg")
TOKENS_OF = 64
"""Sequences whose decoding is timed where nothing else is asked for."""


def bench(
    spec: SpecOption,
    layer: Annotated[list[str] | None, typer.Option("--layer", help="Only this layer; may be repeated.")] = None,
    only: Annotated[
        list[Kind] | None, typer.Option("--only", help="Only these contenders; may be repeated. All if not given.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Also another implementation, by its adapter as module:function; may be repeated."),
    ] = None,
    decode: Annotated[
        list[int] | None,
        typer.Option("--decode", min=0, help="Batch of which one token is decoded; 64 if not given, 0 for none."),
    ] = None,
    sweep: Annotated[
        list[Axis] | None,
        typer.Option("--sweep", help="In place of the workloads, sizes along this axis; may be repeated."),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the sweeps into this .png or .svg.")] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Exit 1 if slower than this --json of an earlier run, or tuning database."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order of turns and of resampling.")] = 0,
    db: DbOption = None,
    no_db: NoDbOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Time the kernels of every workload beside PyTorch and peers, each verified first; needs a GPU."""
    from m2gen import pipeline
    from m2gen.bench.peers import peers
    from m2gen.cli.show.bench import run_against, run_bench, run_sweeps

    with reporting(debug):
        axes = list(dict.fromkeys(sweep or ()))
        _check(axes, plot, against)
        batches = tuple(batch for batch in ([TOKENS_OF] if decode is None else decode) if batch)
        request = pipeline.BenchRequest(tuple(layer or ()), tuple(only or Kind), tuple(peer or ()), batches, seed)
        records = records_of(db, no_db)
        planned = pipeline.plan(spec, None, records)
        peers(request.peers)
        pipeline.workloads(planned, request)  # what is wrong with the request is said before a GPU is looked for
        progress = terminal_progress(quiet)
        with pipeline.this_bench_context("m2gen bench") as context:
            if axes:
                swept = (pipeline.sweep(planned, axis, request, context, records, progress) for axis in axes)
                raise typer.Exit(run_sweeps(swept, context, plot, as_json=json))
            if against is not None:
                before = pipeline.baseline(against, context.environment)
                found = pipeline.regressions(planned, request, context, before, progress)
                raise typer.Exit(run_against(found, before, context, as_json=json))
            results = pipeline.bench(planned, request, context, progress)
            raise typer.Exit(run_bench(results, context, as_json=json))


def _check(axes: list[Axis], plot: Path | None, against: Path | None) -> None:
    """Raise UsageError for options that do not go together, or cannot be met."""
    if axes and against is not None:
        raise UsageError("--against must be given without --sweep: it compares the spec's workloads")
    if plot is None:
        return
    if not axes:
        raise UsageError("--plot must be given with --sweep, which says what it is drawn over")
    if plot.suffix not in FIGURES:
        raise UsageError(f"--plot must end in {' or '.join(FIGURES)}, got {str(plot)!r}")
    from m2gen.cli.show.plot import require

    require()
