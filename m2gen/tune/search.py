"""Propose candidates: seeds first, then every point in a seeded order, or what a sampler proposes."""

from __future__ import annotations

import random
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from m2gen.kernels.options import MOST_REGISTERS
from m2gen.schedule import AnySchedule, Schedule, Scratch
from m2gen.schedule.layer_knobs import Tiles
from m2gen.tune.coordinates import Axes, axes_of, columns, distributions, indices, moved, place, values_of
from m2gen.tune.sampler import Sampler
from m2gen.tune.trial import Trial

if TYPE_CHECKING:
    from optuna.trial import Trial as Asked

COMBINED_EVERY = 3
"""Proposals from one best pair of separately timed forward and backward to the next."""
COMBINED_AFTER = 12
"""Candidates that passed before parts are combined."""
SEARCHED, EVERY = "search", "every"
"""Origins of what a sampler proposes, and of the points of a space that is tried as a whole."""


@dataclass(frozen=True)
class Proposal:
    """A candidate to try, and why."""

    schedule: AnySchedule
    origin: str
    asked: Asked | None = None
    """Optuna's trial, which proposed this candidate or one nearby."""


def neighbours(schedule: AnySchedule, points: Sequence[AnySchedule]) -> list[AnySchedule]:
    """Return the points that are one step of one axis of the family away, or the next that there is, in their order.

    They say which knob matters, and most share interval, tanh and segments, so that their parts can be combined.
    """
    every, values = set(points), values_of(schedule)
    found = []
    for name, axis in schedule.AXES.items():
        here = place(axis, values[name])
        for further in (reversed(axis[:here]), axis[here + 1 :]):
            found += [point for point in (moved(schedule, {name: value}) for value in further) if point in every][:1]
    return found


SIDES = ("forward", "backward")
ACROSS = {"backward.rows": 16, "backward.chunk": 8, "backward.scratch": Scratch.SLOTS, "interval": 8}
"""A backward with slots whose warps, one for 16 columns, have the same rows."""
MANY_SEGMENTS = 7
"""Segments that let a wave that is a quarter full take little more than a quarter of its time."""


def tiles(starts: Sequence[Schedule], points: Sequence[AnySchedule]) -> list[AnySchedule]:
    """Return the points whose kernels both have half, as many, or twice the rows of a start, the first being tried.

    Rows trade programs for the work of each, in both kernels alike, and which family is faster depends on them: a step
    of one axis from the default misses what two of them gain together. So do forwards of two warps, which sum y in
    shared memory, forwards with slots, which have the tiles of the backward, and segments, which are worth most where
    both kernels have tiles that suit them, and backwards with slots whose warps have columns of the same rows.
    """
    found: list[AnySchedule] = []
    first = starts[0]
    for start in starts:
        rows = {name: getattr(start, side).rows for side in SIDES if (name := f"{side}.rows") in start.AXES}
        scaled = ({name: int(count * scale) for name, count in rows.items()} for scale in (2, 0.5, 1))
        found += [moved(start, knobs) for knobs in scaled]
    pair = {"forward.rows": 2 * first.forward.rows, "forward.warps": 2 * first.forward.warps}
    back = first.backward
    slots = {
        "forward.rows": back.rows,
        "forward.warps": back.warps,
        "forward.unroll": back.chunk,
        "forward.slots": True,
    }
    explicit = [start for start in starts if "backward.scratch" in start.AXES]
    for warps, start in product((2, 4, 8), explicit):
        backward = {**ACROSS, "backward.warps": warps}
        forward = {"forward.rows": 16, "forward.warps": warps, "forward.unroll": 8, "forward.slots": True}
        found += [moved(start, {**backward, **forward}), moved(start, backward)]
    several = [{**slots, "forward.registers": most} for most in (MOST_REGISTERS, 0)]
    for segments in (first.segments, MANY_SEGMENTS):
        found += [moved(first, {**knobs, "segments": segments}) for knobs in (*several, pair, {})]
    every = set(points)
    return [point for point in dict.fromkeys(found) if point in every and point != first]


class Proposer:
    """Proposes points of a space, each at most once."""

    def __init__(
        self,
        points: Sequence[AnySchedule],
        seeds: Sequence[tuple[AnySchedule, str]],
        sampler: Sampler | None,
        seed: int,
    ) -> None:
        """``seeds`` are tried first, the default before all others, whether they are points of the space or not.

        Without a ``sampler`` all points follow, in an order drawn from ``seed``.
        """
        self.default = seeds[0][0]
        self._points = list(dict.fromkeys((*points, *(schedule for schedule, _ in seeds))))
        self._left = dict.fromkeys(self._points)
        order = list(self._points)
        random.Random(seed).shuffle(order)
        self._order = iter(order)
        self._seeds = iter(seeds)
        self._sampler = sampler
        self._seed = seed
        self._trials: list[Trial] = []
        self._proposed = 0

    @property
    def left(self) -> int:
        """Points that were not proposed."""
        return len(self._left)

    def skip(self, schedule: AnySchedule) -> None:
        """Never propose a candidate that is known, or that somebody else has."""
        self._left.pop(schedule, None)

    def ask(self) -> Proposal | None:
        """Return the next candidate, None where every point was proposed."""
        for schedule, origin in self._seeds:
            if schedule in self._left:
                return self._take(Proposal(schedule, origin))
        if not self._left:
            return None
        self._proposed += 1
        if self._sampler is not Sampler.TPE:
            origin = EVERY if self._sampler is None else SEARCHED
            return self._take(Proposal(next(p for p in self._order if p in self._left), origin))
        if self._proposed % COMBINED_EVERY == 0:
            combined = best_combination(self._trials, self._left)
            if combined is not None:
                return self._take(Proposal(combined, "combined"))
        return self._take(self._ask_study())

    def tell(self, proposal: Proposal | None, trial: Trial) -> None:
        """Learn what came of a proposal, or of a trial of another worker or run."""
        from optuna.trial import TrialState, create_trial

        self._trials.append(trial)
        self._left.pop(trial.schedule, None)
        if self._sampler is not Sampler.TPE:
            return
        if proposal is not None and proposal.asked is not None:
            self._study.tell(proposal.asked, state=TrialState.FAIL)
        value = trial.median_ms
        self._study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                params={name: place for name, place in indices(trial.schedule).items() if name in self._axes},
                distributions=distributions(self._axes),
                value=_LARGE if value is None else float(np.log(value)),
            )
        )

    def _take(self, proposal: Proposal) -> Proposal:
        del self._left[proposal.schedule]
        return proposal

    @cached_property
    def _study(self) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(
            multivariate=True, constant_liar=True, n_startup_trials=COMBINED_AFTER, seed=self._seed
        )
        return optuna.create_study(sampler=sampler)

    def _ask_study(self) -> Proposal:
        asked = self._study.ask(distributions(self._axes))
        return Proposal(self._nearest(asked.params), SEARCHED, asked)

    def _nearest(self, params: dict[str, int]) -> AnySchedule:
        """Return the point not yet proposed that is fewest steps of the axes away; the first of several."""
        wanted = np.array([params[name] for name in self._axes], dtype=np.int16)
        distance = np.abs(self._vectors - wanted).sum(1)
        for index in np.argsort(distance, kind="stable"):
            if self._points[int(index)] in self._left:
                return self._points[int(index)]
        raise AssertionError("a point must be left")

    @cached_property
    def _axes(self) -> Axes:
        """The axes along which there is a choice: a sampler learns nothing of others, and spends trials on it."""
        every = axes_of(self.default)
        return {name: every[name] for name, places in zip(every, self._places.T, strict=True) if np.ptp(places)}

    @cached_property
    def _vectors(self) -> Any:
        return self._places[:, [name in self._axes for name in axes_of(self.default)]]

    @cached_property
    def _places(self) -> Any:
        return np.array(list(columns(self._points)), dtype=np.int16).T


_LARGE = 20.0
"""Logarithm of a time in milliseconds that no candidate takes: what the sampler is told of those that failed."""


def best_combination(trials: Iterable[Trial], left: Container[AnySchedule]) -> Schedule | None:
    """Return the point of ``left`` whose forward and backward were timed in two trials and add up to the least.

    A call's time is the sum of both kernels' times, and each depends on its own knobs, family and tanh, and a little on
    the interval, which is that of either trial. None before ``COMBINED_AFTER`` trials have passed, where no sum
    promises more than the best trial, and of tiles, which a kernel has alone.
    """
    passed = [trial for trial in trials if trial.samples and not trial.failure and trial.samples.backward_ms]
    if len(passed) < COMBINED_AFTER:
        return None
    forwards: dict[Any, tuple[float, Schedule]] = {}
    backwards: dict[Any, tuple[float, Schedule]] = {}
    for trial in passed:
        schedule, samples = trial.schedule, trial.samples
        if isinstance(schedule, Tiles) or samples is None:
            continue
        both = (schedule.family, schedule.tanh, schedule.segments)
        for table, part, times in (
            (forwards, schedule.forward, samples.forward_ms),
            (backwards, schedule.backward, samples.backward_ms),
        ):
            key = part, both
            known = table.get(key, (float("inf"), schedule))
            table[key] = min(known, (float(np.median(times)), schedule), key=lambda pair: pair[0])
    best = min(trial.samples.median_ms for trial in passed if trial.samples)
    sums = [
        (one + other, replace(schedule, forward=forward, backward=backward))
        for (forward, both), (one, first) in forwards.items()
        for (backward, same), (other, second) in backwards.items()
        if both == same and one + other < best
        for schedule in (second, first)
    ]
    return next((point for _, point in sorted(sums, key=lambda pair: pair[0]) if point in left), None)
