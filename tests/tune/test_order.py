"""The order of what runs: small spaces as a whole, what spills last, finalists in turns with the default."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import simulated
from searches import DEFAULT, SPEC, Silent
from simulated import lines

from m2gen.db import Database
from m2gen.pipeline import plan
from m2gen.pipeline.goals import TuneRequest
from m2gen.pipeline.tune import Tuned, tune
from m2gen.spec import Objective
from m2gen.tune.final import FINALISTS, ROUNDS
from m2gen.tune.sampler import Sampler
from m2gen.tune.space import enumerate_space

SMALL = SPEC.replace("state_expansion: 64", "state_expansion: 16")
"""A variant with few schedules for inference."""


def place(folder: Path, patch: pytest.MonkeyPatch, spec: str) -> Path:
    """Return the log of a simulated GPU, in a working directory with this spec."""
    simulated.place(folder, patch, spec)
    return simulated.script(folder / "script.json")


def search(database: str, compilers: int = 2, **request: Any) -> Tuned:
    """Run the one search of the spec from nothing, with a database of its own."""
    asked = TuneRequest(Database(Path(database)), fresh=True, **request)
    (tuned,) = tune(plan("one.yaml"), asked, simulated.context(compilers=compilers), Silent())
    return tuned


def screened(log: Path) -> list[str]:
    """Return the candidates that were gated and timed, in order."""
    return [line.split()[1] for line in lines(log) if line.startswith("screen")]


def test_a_space_that_fits_the_budget_is_tried_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every point once, the default first, the others in an order that the seed decides; nothing is searched."""
    place(tmp_path, monkeypatch, SMALL)
    runs = {"first": 1, "same": 1, "other": 2}
    first, same, other = (
        search(name, seconds=600.0, seed=seed, objective=Objective.INFER) for name, seed in runs.items()
    )
    points = enumerate_space(first.goal.subject).points
    assert len(points) > 20
    orders = [[trial.schedule for trial in tuned.outcome.trials] for tuned in (first, same, other)]
    for order in orders:
        assert len(order) == len(points)
        assert set(order) == set(points)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0][0] == orders[2][0] == first.outcome.default
    assert Counter(trial.origin for trial in first.outcome.trials) == {"default": 1, "every": len(points) - 1}


@pytest.mark.parametrize(("seconds", "trials"), [(60.0, None), (600.0, 20)], ids=["budget", "trials"])
def test_a_space_that_does_not_fit_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, trials: int | None
) -> None:
    """Neither more points than the time allows nor more than the trials make a search exhaustive."""
    place(tmp_path, monkeypatch, SMALL)
    tuned = search("db", seconds=seconds, trials=trials, objective=Objective.INFER)
    origins = {trial.origin for trial in tuned.outcome.trials}
    assert "neighbour" in origins
    assert "every" not in origins


def test_what_spills_is_screened_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A point that the search proposes waits for those that do not spill, and is timed; the default does not wait."""

    def order(database: str, **says: object) -> list[str]:
        log = simulated.script(tmp_path / f"{database}.json", **says)
        tuned = search(database, compilers=4, seconds=60.0, trials=10, sampler=Sampler.RANDOM)
        assert all(trial.median_ms for trial in tuned.outcome.trials)
        return screened(log)

    simulated.place(tmp_path, monkeypatch, SPEC)
    first, second, *others = order("plain")
    assert first == DEFAULT
    assert order("spilling", spilling=[first, second]) == [first, *others, second]


def test_every_round_of_the_final_has_the_default_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After all are gated: rounds of the same finalists once each, the default among them, not in the same order."""
    log = place(tmp_path, monkeypatch, SPEC)
    tuned = search("db", seconds=60.0, trials=16)
    steps = [line.split() for line in lines(log) if line.startswith(("held_out", "time"))]
    gated, timed = ([slug for step, slug in steps if step == name] for name in ("held_out", "time"))
    assert len(gated) == len(set(gated)) == FINALISTS + 1
    assert [step for step, _ in steps[: len(gated)]] == ["held_out"] * len(gated)
    rounds = [timed[start : start + len(gated)] for start in range(0, len(timed), len(gated))]
    assert len(rounds) == ROUNDS
    for each in rounds:
        assert sorted(each) == sorted(gated)
        assert each.count(DEFAULT) == 1
    assert len({tuple(each) for each in rounds}) > ROUNDS // 2
    assert len({each.index(DEFAULT) for each in rounds}) > 1
    assert {schedule.slug for schedule in tuned.outcome.finals} == set(gated)


def test_a_trial_counts_all_its_time_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Screening, the held-out check and every round of the final are the cost of a trial, and of the search."""
    place(tmp_path, monkeypatch, SPEC)
    log = simulated.script(tmp_path / "script.json", takes=0.25)
    tuned = search("db", seconds=60.0, trials=12)
    steps = Counter(slug for step, slug in map(str.split, lines(log)) if step != "compile")
    assert {trial.schedule.slug: trial.gpu_seconds for trial in tuned.outcome.trials} == {
        slug: 0.25 * count for slug, count in steps.items()
    }
    assert steps[DEFAULT] > 2
    assert tuned.outcome.gpu_seconds == 0.25 * steps.total()
