"""What ``m2gen tune`` prints: sizes of spaces, live progress, and the closing table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from m2gen.compile import workers
from m2gen.db import Database
from m2gen.errors import UsageError
from m2gen.pipeline import Plan, shipped_database
from m2gen.pipeline.tune import (
    Size,
    Tuned,
    TuneRequest,
    dry_run,
    dry_run_device,
    this_rig,
    tune,
)
from m2gen.report import print_json, print_table
from m2gen.spec import Objective
from m2gen.tune.book import Standing
from m2gen.tune.search import Sampler
from m2gen.tune.trial import Trial

Value = TypeVar("Value")
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


@dataclass(frozen=True)
class TuneOptions:
    """The command's options as they were typed."""

    layers: tuple[str, ...]
    budget: str | None
    trials: int | None
    seed: int
    sampler: str
    objective: str | None
    max_memory: str | None
    db: Path | None
    storage: str | None
    fresh: bool
    dry_run: bool
    target: str | None
    report: Path | None

    def request(self) -> TuneRequest:
        """Return what the options ask for; raises UsageError where one cannot be read."""
        return TuneRequest(
            database=Database(self.db) if self.db else shipped_database(),
            layers=self.layers,
            seconds=_read("--budget", "a time such as 10m or 90s", duration, self.budget),
            trials=self.trials,
            seed=self.seed,
            sampler=_read("--sampler", "tpe or random", Sampler, self.sampler) or Sampler.TPE,
            objective=_read("--objective", "train or infer", Objective, self.objective),
            max_bytes=_read("--max-memory", "a size such as 2GB", memory, self.max_memory),
            storage=self.storage,
            fresh=self.fresh,
        )


def _read(option: str, what: str, parse: Callable[[str], Value], text: str | None) -> Value | None:
    try:
        return None if text is None else parse(text)
    except ValueError:
        raise UsageError(f"{option} must be {what}, got {text!r}") from None


def run_tune(planned: Plan, options: TuneOptions, *, as_json: bool, quiet: bool, debug: bool) -> int:
    """Do what ``m2gen tune`` was asked for; return its exit status."""
    request = options.request()
    if options.dry_run:
        device = dry_run_device(options.target, planned.spec.targets)
        show_sizes(dry_run(planned, request, device, workers()), as_json=as_json)
        return 0
    if options.target is not None:
        raise UsageError("--target must be given with --dry-run only: a search runs on the GPU at hand")
    rig = this_rig(request)
    watcher = TerminalWatcher(quiet=quiet or as_json, debug=debug)
    results: list[Tuned] = []
    try:
        results.extend(tune(planned, request, rig, watcher))
    finally:
        watcher.close()
        status = show_tuned(results, as_json=as_json) if results else 1
    return 130 if any(tuned.outcome.interrupted for tuned in results) else status


def duration(text: str) -> float:
    """Return the seconds of ``10m``, ``90s``, ``1h`` or a number of seconds; raises ValueError."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    unit = units.get(text[-1:], 1.0)
    seconds = float(text[:-1] if text[-1:] in units else text) * unit
    if not 0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds


def memory(text: str) -> int:
    """Return the bytes of ``2GB``, ``500MB``, ``1GiB`` or a number of bytes; raises ValueError."""
    units = {"gib": 2**30, "mib": 2**20, "kib": 2**10, "gb": 10**9, "mb": 10**6, "kb": 10**3, "b": 1}
    unit = next((unit for unit in units if text.lower().endswith(unit)), "")
    size = float(text[: len(text) - len(unit)]) * units.get(unit, 1)
    if not 0 < size < 2**60:
        raise ValueError(text)
    return int(size)


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
            found = f"{trial.failure.reason}: {trial.failure.message}" if trial.failure else f"{trial.median_ms:.3f} ms"
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


def show_tuned(results: Sequence[Tuned], *, as_json: bool) -> int:
    """Print default against tuned for every search, and what the search cost; return 1 where one has no winner."""
    status = 0 if all(tuned.outcome.choice for tuned in results) else 1
    if as_json:
        print_json([_tuned_json(tuned) for tuned in results])
    else:
        print_table("Tuned", CLOSING_COLUMNS, map(_row, results))
    for tuned in results:
        if tuned.outcome.choice is None:
            print(f"m2gen: {tuned.goal.layer}: {_no_winner(tuned)}", file=sys.stderr)
    return status


def _no_winner(tuned: Tuned) -> str:
    default = next((t for t in tuned.outcome.trials if t.schedule == tuned.outcome.default), None)
    if default is not None and default.failure is not None:
        return f"the default schedule failed ({default.failure.reason}: {default.failure.message}): nothing to compare"
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
