"""Print the sizes of search spaces, and the results of searches."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from m2gen.cli.files import check_output, write_output
from m2gen.cli.show.names import goal_name
from m2gen.cli.show.page import tuning_page
from m2gen.cli.show.report import Display, print_json
from m2gen.cli.show.table import Table, print_tables
from m2gen.cli.show.watcher import TerminalWatcher
from m2gen.errors import TuneError
from m2gen.pipeline import Plan, Size, Tuned, TuneRequest, this_tuning_context
from m2gen.pipeline import tune as search
from m2gen.tune.services import TuningContext
from m2gen.variant import Variant

TIME_COLUMNS = ("layer", "size", "default ms", "tuned ms", "95 % interval", "speed-up", "extra GB", "record")
COST_COLUMNS = ("layer", "size", "schedule", "trials", "failed", "seconds", "GPU s")
MORE_COLUMNS = ("variant", "slug")
"""Columns that --verbose adds."""


ORIGINS = {
    "default": "the default, which others are compared with",
    "record": "a record of these calls, on this GPU",
    "similar": "won on this architecture, for the same dims",
    "elsewhere": "won on another architecture, for the same dims",
    "tile": "rows, segments or slots, which several knobs make together",
    "neighbour": "one knob from the default",
}
"""Why a candidate is among the first, by its origin."""


def run(planned: Plan, request: TuneRequest, report: Path | None, display: Display) -> int:
    """Search, show progress and the closing tables, write the report; return the exit status."""
    check_output("--report", report)
    context = this_tuning_context("m2gen tune")
    watcher = TerminalWatcher(display)
    results: list[Tuned] = []
    try:
        for tuned in search(planned, request, context, watcher):
            results.append(tuned)  # noqa: PERF402  (must survive an error in the next search)
    finally:
        watcher.close()
        if results:
            show_tuned(results, planned.names, display)
            _write_page(report, planned, context, results)
    if any(tuned.outcome.interrupted for tuned in results):
        return 130
    return 0 if all(tuned.outcome.choice for tuned in results) else 1


def _write_page(report: Path | None, planned: Plan, context: TuningContext, results: Sequence[Tuned]) -> None:
    if report is None:
        return
    page = tuning_page(planned, context.environment, results)
    write_output("--report", report, page, TuneError, "; records are kept")


def show_sizes(sizes: Sequence[Size], names: Mapping[Variant, str], *, as_json: bool) -> None:
    """Print the number of points in each space, why others are excluded, and the time to try all."""
    if as_json:
        print_json([_size_json(size) for size in sizes])
    else:
        titled = [(size, goal_name(size.goal, names)) for size in sizes]
        print_tables(table for size, name in titled for table in (size_table(size, name), first_table(size, name)))


def size_table(size: Size, name: str) -> Table:
    """Return the table of one search's space."""
    space, subject = size.space, size.goal.subject
    rows = [(f"product of the axes of {family}", count) for family, count in space.products.items()]
    rows += sorted(((why, -count) for why, count in space.pruned.items()), key=lambda row: row[1])
    rows += [("points", len(space.points)), ("seconds to try all, about", round(size.seconds))]
    title = f"{name}, {subject.size}, {subject.device.arch}"
    return Table(title, ("what", "count"), rows)


def first_table(size: Size, name: str) -> Table:
    """Return the table of the candidates that would be tried first, in order; knobs are said beside the default."""
    subject = size.goal.subject
    default = subject.tunable.default(subject.device, subject.bucket)
    rows = [(schedule.describe(default), ORIGINS[origin]) for schedule, origin in size.first]
    notes = [] if size.first else ["each of these is known to fail"]
    return Table(f"{name}, first on {subject.device.arch}", ("schedule", "why") if rows else (), rows, notes)


def _size_json(size: Size) -> dict[str, Any]:
    subject = size.goal.subject
    return {
        "layer": size.goal.layer,
        "variant": subject.tunable.key,
        "batch": subject.batch,
        "seq": subject.seq,
        "arch": subject.device.arch,
        "objective": str(subject.objective),
        "product": size.space.size,
        "products": size.space.products,
        "pruned": size.space.pruned,
        "points": len(size.space.points),
        "expected_seconds": round(size.seconds),
        "first": [{"schedule": schedule.slug, "origin": origin} for schedule, origin in size.first],
    }


def show_tuned(results: Sequence[Tuned], names: Mapping[Variant, str], display: Display) -> None:
    """Print the default and tuned times of every search, and its cost."""
    if display.as_json:
        print_json([_tuned_json(tuned) for tuned in results])
    else:
        print_tables(tuned_tables(results, names, verbose=display.verbose))
    for tuned in results:
        name = goal_name(tuned.goal, names)
        if tuned.outcome.choice is None:
            print(f"m2gen: {name}: {_no_winner(tuned)}", file=sys.stderr)
        if tuned.outcome.clocks is not None and tuned.outcome.clocks.warning:
            print(f"m2gen: {name}: {tuned.outcome.clocks.warning}", file=sys.stderr)


def tuned_tables(results: Sequence[Tuned], names: Mapping[Variant, str], *, verbose: bool) -> list[Table]:
    """Return the table of times, and that of schedules and the cost of finding them."""
    named = [(tuned, (goal_name(tuned.goal, names), tuned.goal.subject.size)) for tuned in results]
    return [
        Table("Tuned", TIME_COLUMNS, [(*name, *_times(tuned)) for tuned, name in named]),
        Table(
            "Schedules, and what finding them took",
            (*COST_COLUMNS, *MORE_COLUMNS) if verbose else COST_COLUMNS,
            [(*name, *_costs(tuned), *(_more(tuned) if verbose else ())) for tuned, name in named],
        ),
    ]


def _no_winner(tuned: Tuned) -> str:
    default = next((t for t in tuned.outcome.trials if t.schedule == tuned.outcome.default), None)
    if default is not None and default.failure is not None:
        return f"the default schedule failed ({default.failure.reason}: {default.failure.message}): nothing to compare"
    if default is not None:
        return "no schedule that passed is within --max-memory"
    return "interrupted or out of time before the default schedule was measured; the trials so far are kept"


def _tuned_json(tuned: Tuned) -> dict[str, Any]:
    outcome, subject = tuned.outcome, tuned.goal.subject
    found: dict[str, Any] = {
        "layer": tuned.goal.layer,
        "variant": subject.tunable.key,
        "batch": subject.batch,
        "seq": subject.seq,
        "objective": str(subject.objective),
        "trials": len(outcome.trials),
        "failures": {},
        "seconds": round(outcome.seconds, 2),
        "gpu_seconds": round(outcome.gpu_seconds, 2),
        "compile_seconds": round(outcome.compile_seconds, 2),
        "interrupted": outcome.interrupted,
        "clocks": asdict(outcome.clocks) if outcome.clocks else None,
        "records": [record.id for record in tuned.records],
    }
    for trial in outcome.trials:
        if trial.failure:
            kind = str(trial.failure.reason)
            found["failures"][kind] = found["failures"].get(kind, 0) + 1
    if outcome.choice is not None:
        best, default = outcome.choice.estimates[outcome.choice.winner], outcome.choice.estimates[outcome.default]
        found |= {
            "schedule": outcome.choice.winner.slug,
            "tuned_ms": [best.low_ms, best.median_ms, best.high_ms],
            "default_ms": [default.low_ms, default.median_ms, default.high_ms],
            "ties": [schedule.slug for schedule in outcome.choice.ties],
            "peak_bytes": outcome.finals[outcome.choice.winner].peak_bytes,
        }
    return found


def _times(tuned: Tuned) -> tuple[Any, ...]:
    outcome = tuned.outcome
    if outcome.choice is None:
        return ("",) * 6
    winner = outcome.choice.winner
    best, default = outcome.choice.estimates[winner], outcome.choice.estimates[outcome.default]
    return (
        f"{default.median_ms:.3f}",
        f"{best.median_ms:.3f}",
        f"{best.low_ms:.3f} to {best.high_ms:.3f}",
        f"{default.median_ms / best.median_ms:.2f}x",
        f"{outcome.finals[winner].peak_bytes / 1e9:.3f}",
        next((record.id for record in tuned.records if record.failure is None), ""),
    )


def _costs(tuned: Tuned) -> tuple[Any, ...]:
    outcome = tuned.outcome
    failed = sum(trial.failure is not None for trial in outcome.trials)
    name = "none"
    if outcome.choice is not None:
        winner = outcome.choice.winner
        name = "the default" if winner == outcome.default else winner.describe()
    return (name, len(outcome.trials), failed, f"{outcome.seconds:.0f}", f"{outcome.gpu_seconds:.0f}")


def _more(tuned: Tuned) -> tuple[str, str]:
    choice = tuned.outcome.choice
    return tuned.goal.subject.tunable.key, choice.winner.slug if choice else ""
