"""The bound of memory: by arithmetic and as measured, whoever brings a candidate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import simulated
from searches import DEFAULT, NEIGHBOUR, SPEC, STANDARD, Silent
from simulated import PEAK
from support import make_schedule, make_variant

from m2gen.db import Database
from m2gen.kernels.lowering import Lowering
from m2gen.pipeline import plan
from m2gen.pipeline.goals import TuneRequest
from m2gen.pipeline.tune import Tuned, tune
from m2gen.schedule import parse
from m2gen.spec import Objective
from m2gen.tune.memory import USUAL, MemoryBound, extra_bytes
from m2gen.tune.space import fits
from m2gen.tune.trial import Samples

HEAVY = replace(STANDARD, interval=8).slug
"""Twice the checkpoints of the default, which are most of its memory: over the usual bound, by arithmetic."""
GIB = 2**30


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a spec of one workload in an empty working directory."""
    return simulated.place(tmp_path, monkeypatch, SPEC)


def search(spec: Path, memory: MemoryBound, objective: Objective = Objective.TRAIN) -> Tuned:
    """Run the one search of the spec within a bound."""
    database = Database(spec.parent / "db")
    request = TuneRequest(database, seconds=60, trials=24, memory=memory, objective=objective)
    (tuned,) = tune(plan(str(spec)), request, simulated.context(), Silent())
    return tuned


def winner(tuned: Tuned) -> str:
    """Return the slug of a search's winner."""
    assert tuned.outcome.choice is not None
    return tuned.outcome.choice.winner.slug


BOUNDS = {
    "times": (USUAL, Objective.TRAIN, int(1.5 * PEAK), True),
    "over_times": (USUAL, Objective.TRAIN, int(1.5 * PEAK) + 1, False),
    "times_of_inference": (USUAL, Objective.INFER, 10 * PEAK, True),
    "size": (MemoryBound(size=2 * GIB), Objective.TRAIN, 2 * GIB, True),
    "over_size": (MemoryBound(size=2 * GIB), Objective.TRAIN, 2 * GIB + 1, False),
    "any": (MemoryBound(), Objective.TRAIN, 40 * GIB, True),
}
"""A bound, what is tuned for, the measured peak of the fastest, and whether that may win."""


@pytest.mark.parametrize(("memory", "objective", "peak", "wins"), BOUNDS.values(), ids=BOUNDS.keys())
def test_a_measured_peak_over_the_bound_cannot_win(
    spec: Path, memory: MemoryBound, objective: Objective, peak: int, wins: bool
) -> None:
    """The fastest by far fits by arithmetic; it wins, and is a finalist, only where its measured peak fits, too."""
    simulated.script(spec.parent / "script.json", ms={NEIGHBOUR: 0.5}, peak={NEIGHBOUR: peak})
    tuned = search(spec, memory, objective)
    assert fits(tuned.goal.subject, parse(NEIGHBOUR))
    assert parse(NEIGHBOUR) in {trial.schedule for trial in tuned.outcome.trials if trial.samples}
    assert (winner(tuned) == NEIGHBOUR) is wins
    assert (parse(NEIGHBOUR) in tuned.outcome.finals) is wins


def test_a_default_over_the_bound_is_compared_with_and_cannot_win(spec: Path) -> None:
    """Where all take the same time the default wins; over the bound by arithmetic it does not, small as its peak is."""
    simulated.script(spec.parent / "script.json", every=3.75)
    small = MemoryBound(size=300 * 2**20)
    tuned = search(spec, small)
    assert not fits(tuned.goal.subject, parse(DEFAULT))
    assert parse(DEFAULT) in tuned.outcome.finals
    assert winner(tuned) != DEFAULT
    others = [trial.schedule for trial in tuned.outcome.trials if trial.schedule.slug != DEFAULT]
    assert all(fits(tuned.goal.subject, schedule) for schedule in others)
    assert winner(search(spec, USUAL)) == DEFAULT


def test_what_a_journal_brings_is_held_to_the_bound_of_this_search(spec: Path) -> None:
    """A candidate that an unbounded search found is known to the bounded one that follows, and does not win it."""
    simulated.script(spec.parent / "script.json", ms={HEAVY: 1.0})
    assert winner(search(spec, MemoryBound())) == HEAVY
    tuned = search(spec, USUAL)
    assert parse(HEAVY) in {trial.schedule for trial in tuned.outcome.trials}
    assert winner(tuned) != HEAVY


@pytest.mark.parametrize(("beyond", "gradients"), [(0, 0), (1, 5)])
def test_segments_hand_a_gradient_to_each_other(beyond: int, gradients: int) -> None:
    """Sequences that are longer than the shortest that segments share have a float32 state more, each."""
    variant, one = make_variant(64, 16, (1, 1, 4, 4, 4), "bf16"), make_schedule(interval=16)
    many = replace(one, segments=3)
    seq = many.shortest_segment + beyond
    whole, shared = (extra_bytes(Lowering(variant, each), 5, seq, training=True) for each in (one, many))
    assert shared - whole == gradients * 4 * 64 * 16 * 4


@pytest.mark.parametrize("peaks", [(10, 5), (5, 10)])
def test_samples_of_rounds_have_the_largest_peak(peaks: tuple[int, int]) -> None:
    """Their times are joined, whichever round took the most memory."""
    one, other = Samples((1.0,), (2.0,), peaks[0]), Samples((3.0,), (4.0,), peaks[1])
    assert one + other == Samples((1.0, 3.0), (2.0, 4.0), 10)
