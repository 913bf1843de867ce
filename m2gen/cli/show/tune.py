"""What ``m2gen tune`` prints: sizes of spaces, live progress, and the closing table."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from m2gen.cli.show.page import tuning_page
from m2gen.cli.show.report import print_json, print_table
from m2gen.db import Environment
from m2gen.errors import TuneError, UsageError
from m2gen.pipeline import Plan, Size, Tuned, TuneRequest, this_tuning_context
from m2gen.pipeline import tune as search
from m2gen.tune.log import Standing
from m2gen.tune.trial import Trial

CLOSING_COLUMNS = (
    "layer",
    "batch",
    "seq",
    "default ms",
    "tuned ms",
    "95 % interval",
    "speed-up",
    "schedule",
    "extra GB",
    "trials",
    "failed",
    "seconds",
    "GPU s",
    "record",
)


def run(planned: Plan, request: TuneRequest, report: Path | None, *, as_json: bool, quiet: bool, debug: bool) -> int:
    """Search, show progress and the closing table, write the report; return the exit status."""
    if report is not None and not report.absolute().parent.is_dir():
        raise UsageError(f"--report must be in a folder that is there, got {report}")
    context = this_tuning_context("m2gen tune")
    watcher = TerminalWatcher(quiet=quiet or as_json, debug=debug)
    results: list[Tuned] = []
    try:
        for tuned in search(planned, request, context, watcher):
            results.append(tuned)  # noqa: PERF402  (what there is must survive an error in the next)
    finally:
        watcher.close()
        if results:
            show_tuned(results, as_json=as_json)
            _write_page(report, planned, context.environment, results)
    if any(tuned.outcome.interrupted for tuned in results):
        return 130
    return 0 if all(tuned.outcome.choice for tuned in results) else 1


def _write_page(report: Path | None, planned: Plan, environment: Environment, results: Sequence[Tuned]) -> None:
    if report is None:
        return
    try:
        report.write_text(tuning_page(planned.origin.spec_file, environment, results), encoding="utf-8")
    except OSError as error:
        raise TuneError(f"--report {report} must be writable: {error.strerror or error}; records are kept") from error


class TerminalWatcher:
    """A bar with the best so far on a terminal; a plain line a trial elsewhere; nothing when quiet."""

    def __init__(self, *, quiet: bool, debug: bool) -> None:
        self._quiet, self._debug = quiet, debug
        self._console = Console(stderr=True)
        self._stage = ""
        self._bar: Bar | None = None
        if self._console.is_terminal and not quiet:
            columns = (TextColumn("{task.fields[stage]}"), BarColumn(20), MofNCompleteColumn())
            self._bar = Bar(*columns, TextColumn("{task.description}"), console=self._console)
            self._bar.add_task("", total=None, stage="")
            self._bar.start()

    def stage(self, text: str) -> None:
        self._stage = text
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], stage=text, description="")
        elif not self._quiet:
            print(f"tune {text}", file=sys.stderr, flush=True)

    def trial(self, trial: Trial, standing: Standing) -> None:
        if self._bar is not None:
            text = standing_text(standing)
            self._bar.update(self._bar.task_ids[0], description=text, completed=standing.done, total=standing.most)
        elif not self._quiet:
            found = str(trial.failure) if trial.failure else f"{trial.median_ms:.3f} ms"
            where = f"tune {standing.done}/{standing.most}"
            line = f"{where} {trial.schedule.slug} ({trial.origin}) {found}; {standing_text(standing)}"
            print(line, file=sys.stderr, flush=True)

    def details(self, text: str) -> None:
        if self._debug and text:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def standing_text(standing: Standing) -> str:
    """Say the best so far, its speed-up over the default, failures by kind and the time left, in one line."""
    parts = []
    if standing.best is not None and standing.best.median_ms is not None:
        speed = f" ({standing.default_ms / standing.best.median_ms:.2f}x)" if standing.default_ms else ""
        parts.append(f"best {standing.best.median_ms:.3f} ms{speed}")
    parts += [f"{count} {kind}" for kind, count in sorted(standing.failures.items())]
    left = time.strftime("%M:%S", time.gmtime(standing.seconds_left))
    return ", ".join([*parts, f"{left} left"])


def show_sizes(sizes: Sequence[Size], *, as_json: bool) -> None:
    """Print how many points each space has, why the others are none, and how long trying all would take."""
    if as_json:
        print_json([_size_json(size) for size in sizes])
        return
    for size in sizes:
        space, subject = size.space, size.goal.subject
        title = f"{size.goal.layer}: {subject.variant.key}, B{subject.batch} S{subject.seq}, {subject.device.arch}"
        rows: list[tuple[Any, ...]] = [("product of all axes", space.size)]
        rows += sorted(((why, -count) for why, count in space.pruned.items()), key=lambda row: row[1])
        rows += [("points", len(space.points)), ("seconds to try all, about", round(size.seconds))]
        print_table(title, ("what", "count"), rows)


def _size_json(size: Size) -> dict[str, Any]:
    subject = size.goal.subject
    return {
        "layer": size.goal.layer,
        "variant": subject.variant.key,
        "batch": subject.batch,
        "seq": subject.seq,
        "arch": subject.device.arch,
        "objective": str(subject.objective),
        "product": size.space.size,
        "pruned": size.space.pruned,
        "points": len(size.space.points),
        "expected_seconds": round(size.seconds),
    }


def show_tuned(results: Sequence[Tuned], *, as_json: bool) -> None:
    """Print default against tuned for every search, and what the search cost."""
    if as_json:
        print_json([_tuned_json(tuned) for tuned in results])
    else:
        print_table("Tuned", CLOSING_COLUMNS, map(_row, results))
    for tuned in results:
        if tuned.outcome.choice is None:
            print(f"m2gen: {tuned.goal.layer}: {_no_winner(tuned)}", file=sys.stderr)


def _no_winner(tuned: Tuned) -> str:
    default = next((t for t in tuned.outcome.trials if t.schedule == tuned.outcome.default), None)
    if default is not None and default.failure is not None:
        return f"the default schedule failed ({default.failure}): nothing to compare"
    return "interrupted or out of time before the default schedule was measured; the journal keeps what was"


def _tuned_json(tuned: Tuned) -> dict[str, Any]:
    outcome, subject = tuned.outcome, tuned.goal.subject
    found: dict[str, Any] = {
        "layer": tuned.goal.layer,
        "variant": subject.variant.key,
        "batch": subject.batch,
        "seq": subject.seq,
        "objective": str(subject.objective),
        "trials": len(outcome.trials),
        "failures": {},
        "seconds": round(outcome.seconds, 2),
        "gpu_seconds": round(outcome.gpu_seconds, 2),
        "compile_seconds": round(outcome.compile_seconds, 2),
        "interrupted": outcome.interrupted,
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


def _row(tuned: Tuned) -> tuple[Any, ...]:
    outcome, subject = tuned.outcome, tuned.goal.subject
    failed = sum(trial.failure is not None for trial in outcome.trials)
    cost = (len(outcome.trials), failed, f"{outcome.seconds:.0f}", f"{outcome.gpu_seconds:.0f}")
    if outcome.choice is None:
        return (tuned.goal.layer, subject.batch, subject.seq, "", "", "", "", "none", "", *cost, "")
    winner = outcome.choice.winner
    best, default = outcome.choice.estimates[winner], outcome.choice.estimates[outcome.default]
    speed = f"{default.median_ms / best.median_ms:.2f}x"
    name = "default" if winner == outcome.default else winner.slug
    record = next((record.id for record in tuned.records if record.failure is None), "")
    return (
        tuned.goal.layer,
        subject.batch,
        subject.seq,
        f"{default.median_ms:.3f}",
        f"{best.median_ms:.3f}",
        f"{best.low_ms:.3f} to {best.high_ms:.3f}",
        speed,
        name,
        f"{outcome.finals[winner].peak_bytes / 1e9:.3f}",
        *cost,
        record,
    )
