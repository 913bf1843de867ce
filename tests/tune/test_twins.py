"""Candidates that compile to the same machine code: one of them is measured, whoever is first, and stands for all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import simulated
from searches import DEFAULT, NEIGHBOUR, SPEC, Silent, beside
from simulated import lines

from m2gen.db import Database
from m2gen.pipeline import plan
from m2gen.pipeline.goals import TuneRequest
from m2gen.pipeline.tune import Tuned, tune
from m2gen.tune.trial import Compiled, CompileTask

TWIN = beside(rows=16)


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a spec of one workload in an empty working directory."""
    return simulated.place(tmp_path, monkeypatch, SPEC)


def search(spec: Path, trials: int) -> Tuned:
    """Run the one search of the spec."""
    request = TuneRequest(Database(spec.parent / "db"), seconds=60, trials=trials)
    (tuned,) = tune(plan(str(spec)), request, simulated.context(), Silent())
    return tuned


def test_a_final_has_one_of_the_same_machine_code(spec: Path) -> None:
    """Two names of the fastest binary are both the best of the screening, and one of them is timed again."""
    log = simulated.script(
        spec.parent / "script.json", same={TWIN: "code", NEIGHBOUR: "code"}, ms={TWIN: 0.5, NEIGHBOUR: 0.5}
    )
    tuned = search(spec, 24)
    assert {TWIN, NEIGHBOUR} <= {trial.schedule.slug for trial in tuned.outcome.trials if trial.median_ms}
    timed = {slug for step, slug in map(str.split, lines(log)) if step in ("held_out", "time")}
    assert len(timed & {TWIN, NEIGHBOUR}) == 1


def test_what_is_the_same_as_the_running_candidate_waits_for_it(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all is the same machine code, the default alone reaches the GPU, and all others are its copies."""
    log = simulated.script(spec.parent / "script.json")
    compile_ = simulated.compile_

    def alike(task: CompileTask) -> Compiled:
        return replace(compile_(task), binary="code")

    monkeypatch.setattr(simulated, "compile_", alike)
    tuned = search(spec, 12)
    assert [line for line in lines(log) if line.startswith("screen")] == [f"screen {DEFAULT}"]
    default, *others = tuned.outcome.trials
    assert len(others) == 11
    assert {trial.copy_of for trial in others} == {default.schedule.slug} == {DEFAULT}
    assert {trial.samples for trial in others} == {default.samples}
