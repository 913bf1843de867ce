"""Render a self-contained HTML page about searches: history, knobs, failures, and the GPU's limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from m2gen.cli.show import charts
from m2gen.cli.show.names import goal_name
from m2gen.db import Environment
from m2gen.measure.roofline import Work, floors_ms, peaks_of, work_of
from m2gen.pipeline import Plan, Tuned
from m2gen.schedule import AnySchedule
from m2gen.schedule.layer_knobs import Tiles
from m2gen.spec import Objective
from m2gen.tune.knobs import importances, study_of
from m2gen.tune.trial import Trial


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


def tuning_page(planned: Plan, environment: Environment, results: Sequence[Tuned]) -> str:
    """Return the HTML page of a command's searches, which refers to no other file."""
    facts = [("GPU", f"{environment.device} ({environment.arch}, {environment.sm_count} SMs)")]
    facts += [(name, getattr(environment, name) or "unknown") for name in ("driver", "torch", "triton", "ptxas")]
    names = planned.names
    searches = [_search(tuned, environment, goal_name(tuned.goal, names)) for tuned in results]
    spec = planned.origin.spec_file
    drawn = (
        {"script": charts.script(), "missing": ""} if charts.available() else {"script": "", "missing": charts.MISSING}
    )
    return _template().render(spec=spec, facts=facts, searches=searches, **drawn)


def _search(tuned: Tuned, environment: Environment, name: str) -> dict[str, Any]:
    outcome, subject = tuned.outcome, tuned.goal.subject
    study, drawn = study_of(outcome.trials), charts.available()
    return {
        "title": f"{name}, batch {subject.batch}, {subject.seq} steps, {subject.objective}",
        "cost": f"{len(outcome.trials)} of {outcome.points} points in {outcome.seconds:.0f} s: "
        f"{outcome.gpu_seconds:.0f} s of the GPU, {outcome.compile_seconds:.0f} s of compilers",
        "warning": outcome.clocks.warning if outcome.clocks else "",
        "finalists": _finalists(tuned),
        "history": charts.history(study, tuned) if drawn else "",
        "importance": charts.importance(study) if drawn else "",
        "knobs": _bars(importances(study)),
        "failures": _failures(outcome.trials, outcome.default),
        "floors": _floors(tuned, environment),
    }


def _finalists(tuned: Tuned) -> list[dict[str, Any]]:
    """Return the finalists, fastest first."""
    outcome = tuned.outcome
    if outcome.choice is None:
        return []
    choice, base = outcome.choice, outcome.choice.estimates[outcome.default].median_ms
    rows = []
    for schedule, estimate in sorted(choice.estimates.items(), key=lambda item: item[1].median_ms):
        marks = [
            *(["winner"] if schedule == choice.winner else []),
            *(["default"] if schedule == outcome.default else []),
            *(["tied"] if schedule in choice.ties and len(choice.ties) > 1 else []),
        ]
        rows.append(
            {
                "schedule": schedule.describe(outcome.default),
                "slug": schedule.slug,
                "ms": f"{estimate.median_ms:.3f}",
                "interval": f"{estimate.low_ms:.3f} to {estimate.high_ms:.3f}",
                "speed": f"{base / estimate.median_ms:.2f}",
                "memory": f"{outcome.finals[schedule].peak_bytes / 1e9:.3f}",
                "marks": ", ".join(marks),
            }
        )
    return rows


def _bars(values: dict[str, float]) -> list[dict[str, Any]]:
    most = max(values.values(), default=0.0) or 1.0
    ordered = sorted(values.items(), key=lambda item: -item[1])
    return [{"name": name, "part": f"{value:.0%}", "width": round(300 * value / most)} for name, value in ordered]


def _failures(trials: Sequence[Trial], default: AnySchedule) -> list[dict[str, Any]]:
    """Return every kind of failure with its count and most frequent messages."""
    kinds: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.failure is not None:
            kinds.setdefault(str(trial.failure.reason), []).append(trial)
    found = []
    for kind, failed in sorted(kinds.items(), key=lambda item: -len(item[1])):
        messages = Counter(trial.failure.message for trial in failed if trial.failure).most_common(3)
        example = failed[0].schedule.describe(default)
        found.append({"kind": kind, "count": len(failed), "messages": [m for m, _ in messages], "example": example})
    return found


def _floors(tuned: Tuned, environment: Environment) -> dict[str, Any] | None:
    """Return the time that each limit alone makes the winner's call take, and its fraction of the measured time."""
    outcome, subject = tuned.outcome, tuned.goal.subject
    if outcome.choice is None or isinstance(outcome.choice.winner, Tiles):
        return None
    winner = outcome.choice.winner
    measured = outcome.choice.estimates[winner].median_ms
    training = subject.objective is Objective.TRAIN
    work = work_of(subject.variant, winner, (subject.batch, subject.seq), training=training)
    peaks = peaks_of(environment.device)
    floors = floors_ms(work, peaks, environment.sm_count, subject.variant) if peaks else {}
    rows = [
        {"name": name, "ms": f"{ms:.3f}", "part": f"{ms / measured:.0%}", "width": round(300 * min(1.0, ms / measured))}
        for name, ms in sorted(floors.items(), key=lambda item: -item[1])
    ]
    return {"measured": f"{measured:.3f}", "rows": rows, "work": _work_rows(work, measured)}


def _work_rows(work: Work, ms: float) -> list[tuple[str, str, str]]:
    """Return the amount and rate of every kind of work in a call."""
    flops = work.flops + work.product_flops
    return [
        ("tanh", f"{work.tanh / 1e9:.2f} G", f"{work.tanh / ms / 1e6:.0f} G/s"),
        ("float32 arithmetic", f"{work.flops / 1e9:.1f} GFLOP", f"{work.flops / ms / 1e9:.2f} TFLOP/s"),
        ("products", f"{work.product_flops / 1e9:.1f} GFLOP", f"{work.product_flops / ms / 1e9:.2f} TFLOP/s"),
        ("memory traffic", f"{work.traffic / 1e9:.3f} GB", f"{work.traffic / ms / 1e6:.0f} GB/s"),
        ("arithmetic intensity", f"{flops / work.traffic:.0f} FLOP/B", ""),
    ]
