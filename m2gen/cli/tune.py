"""The command ``m2gen tune`` and its options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from m2gen.cli.complete import complete_target
from m2gen.cli.options import (
    OUTPUT,
    DbOption,
    DebugOption,
    JsonOption,
    LayersOption,
    QuietOption,
    SpecOption,
    VerboseOption,
    examples,
    reporting,
    warn_of_faults,
)
from m2gen.errors import UsageError
from m2gen.spec import Objective
from m2gen.tune.kernels import SearchedKernels
from m2gen.tune.memory import MemoryBound
from m2gen.tune.sampler import Sampler

if TYPE_CHECKING:
    from m2gen.pipeline import Plan, Size, TuneRequest

Value = TypeVar("Value")

SEARCH = "Search"
EXAMPLES = examples(
    "m2gen tune --spec h200.yaml --layer m2rnn_410m --dry-run",
    "m2gen tune --spec h200.yaml --budget 10m --report out.html   # needs a GPU",
    "m2gen tune --spec h200.yaml --layer m2rnn_7b --kernels layer   # needs a GPU",
)

ObjectiveOption = Annotated[
    Objective | None, typer.Option("--objective", help="What to make fast, in place of the spec's.")
]
KernelsOption = Annotated[
    SearchedKernels,
    typer.Option("--kernels", help="Schedules of recurrences, tiles of the kernels around them in layers, or all."),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only show how large the search spaces are and why, and what would be tried first; needs no GPU.",
    ),
]
TargetOption = Annotated[
    str | None,
    typer.Option("--target", help="Architecture whose search spaces --dry-run shows.", autocompletion=complete_target),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget", help="Time for all searches, as 10m or 90s; the spec's if not given.", rich_help_panel=SEARCH
    ),
]
TrialsOption = Annotated[
    int | None,
    typer.Option("--trials", min=1, help="Maximum number of candidates of each search.", rich_help_panel=SEARCH),
]
MaxMemoryOption = Annotated[
    str,
    typer.Option(
        "--max-memory",
        help="Maximum memory of a call: 2GB, 3x that of the default schedule, or any.",
        rich_help_panel=SEARCH,
    ),
]
SamplerOption = Annotated[
    Sampler,
    typer.Option(
        "--sampler",
        help="How to propose candidates if there are too many to try all; random is a baseline.",
        rich_help_panel=SEARCH,
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        "--seed", min=0, max=2**32 - 1, help="Seed of the order of candidates and of intervals.", rich_help_panel=SEARCH
    ),
]
FreshOption = Annotated[
    bool,
    typer.Option(
        "--fresh/--resume",
        help="Start anew, or resume where the last run of a search ended.",
        rich_help_panel=SEARCH,
    ),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="URL of a database through which several workers share each search.",
        rich_help_panel=SEARCH,
    ),
]
ReportOption = Annotated[
    Path | None,
    typer.Option("--report", help="Also write an HTML page about the searches to this file.", rich_help_panel=OUTPUT),
]


def tune(
    spec: SpecOption,
    layer: LayersOption = None,
    kernels: KernelsOption = SearchedKernels.RECURRENCE,
    objective: ObjectiveOption = None,
    dry_run: DryRunOption = False,
    target: TargetOption = None,
    budget: BudgetOption = None,
    trials: TrialsOption = None,
    max_memory: MaxMemoryOption = "1.5x",
    sampler: SamplerOption = Sampler.TPE,
    seed: SeedOption = 0,
    fresh: FreshOption = False,
    storage: StorageOption = None,
    db: DbOption = None,
    report: ReportOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Search for the fastest schedules on this GPU, and add them to the tuning database."""
    from m2gen import pipeline
    from m2gen.cli.show.report import Display
    from m2gen.cli.show.tune import run, show_sizes

    with reporting(debug):
        database = pipeline.open_database(db, new=True)
        warn_of_faults(database.contents())
        request = pipeline.TuneRequest(
            database=database,
            layers=tuple(layer or ()),
            seconds=None if budget is None else _read("--budget", "a time such as 10m or 90s", duration, budget),
            trials=trials,
            seed=seed,
            sampler=sampler,
            objective=objective,
            kernels=kernels,
            memory=_read("--max-memory", "a size such as 2GB, a multiple such as 1.5x, or any", memory, max_memory),
            storage=storage,
            fresh=fresh,
        )
        if storage == "":
            raise UsageError("--storage must be the URL of a database, got ''")
        if target is not None and not dry_run:
            raise UsageError("--target must be given with --dry-run only: a search runs on the GPU at hand")
        of_searches = {"--report": report is not None, "--storage": storage is not None, "--fresh": fresh}
        if dry_run and any(of_searches.values()):
            given = ", ".join(name for name, there in of_searches.items() if there)
            raise UsageError(f"--dry-run searches nothing, and takes no {given}")
        planned = pipeline.plan(spec, None if target is None else [target], ())
        if dry_run:
            show_sizes(_sizes(planned, request, target), planned.names, as_json=json)
            return
        raise typer.Exit(run(planned, request, report, Display(json, quiet, verbose, debug)))


def _sizes(planned: Plan, request: TuneRequest, target: str | None) -> list[Size]:
    from m2gen import pipeline
    from m2gen.measure.workers import cpus

    device = pipeline.dry_run_device(target, planned.spec.targets)
    return pipeline.dry_run(planned, request, device, cpus())


def _read(option: str, what: str, parse: Callable[[str], Value], text: str) -> Value:
    try:
        return parse(text)
    except ValueError:
        raise UsageError(f"{option} must be {what}, got {text!r}") from None


def duration(text: str) -> float:
    """Return the seconds of ``10m``, ``90s``, ``1h`` or a number of seconds; raises ValueError."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    unit = units.get(text[-1:], 1.0)
    seconds = float(text[:-1] if text[-1:] in units else text) * unit
    if not 0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds


def memory(text: str) -> MemoryBound:
    """Return the bound of ``2GB``, ``500MB``, ``1GiB``, a number of bytes, ``1.5x`` or ``any``; raises ValueError."""
    if text == "any":
        return MemoryBound()
    if text.endswith("x"):
        times = float(text[:-1])
        if not 1 <= times < float("inf"):
            raise ValueError(text)
        return MemoryBound(times=times)
    units = {"gib": 2**30, "mib": 2**20, "kib": 2**10, "gb": 10**9, "mb": 10**6, "kb": 10**3, "b": 1}
    unit = next((unit for unit in units if text.lower().endswith(unit)), "")
    size = float(text[: len(text) - len(unit)]) * units.get(unit, 1)
    if not 0 < size < 2**60:
        raise ValueError(text)
    return MemoryBound(size=int(size))
