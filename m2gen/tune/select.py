"""From samples to a winner: bootstrapped intervals, the tie set, and a choice that leans towards the default."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2gen.db import Estimate
from m2gen.schedule import Schedule
from m2gen.tune.space import values_of
from m2gen.tune.trial import Samples

RESAMPLES = 2000
LEVEL = 0.95
NOISE = 0.005
"""Part of a median below which a difference says nothing, however many samples there are: sessions differ by as much
(docs/performance.md)."""


@dataclass(frozen=True)
class Choice:
    """The winner among finalists, and what it was chosen from."""

    winner: Schedule
    estimates: Mapping[Schedule, Estimate]
    ties: tuple[Schedule, ...]
    """Finalists within noise of the fastest, the winner and the fastest among them."""


def _medians(samples: Sequence[float], seed: int) -> Any:
    """Return medians of resamples."""
    values = np.asarray(samples, dtype=np.float64)
    generator = np.random.default_rng(seed)
    return np.median(values[generator.integers(0, len(values), (RESAMPLES, len(values)))], axis=1)


def estimate(samples: Sequence[float], seed: int) -> Estimate:
    """Return the median and its bootstrapped interval."""
    low, high = np.quantile(_medians(samples, seed), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    median = float(np.median(np.asarray(samples)))
    return Estimate(median, min(float(low), median), max(float(high), median))


def difference(one: Sequence[float], other: Sequence[float], seed: int) -> float:
    """Return how far apart two medians may be, as a part of the first: the end of the interval of the difference."""
    apart = np.abs(_medians(other, seed + 1) / _medians(one, seed) - 1)
    return float(np.quantile(apart, LEVEL))


def choose(samples: Mapping[Schedule, Samples], eligible: Collection[Schedule], default: Schedule, seed: int) -> Choice:
    """Return the fastest eligible finalist, or of those within noise of it the default, else the one most like it.

    Within noise: the interval of the difference of medians holds 0, or the difference is below ``NOISE``. So the
    winner is the default, if that is eligible, unless another is faster beyond noise.
    """
    times = {schedule: found.call_ms for schedule, found in samples.items()}
    estimates = {schedule: estimate(values, seed) for schedule, values in times.items()}
    fastest = min(eligible, key=lambda schedule: (estimates[schedule].median_ms, schedule.slug))
    base = _medians(times[fastest], seed)

    def ties(schedule: Schedule) -> bool:
        if schedule == fastest or estimates[schedule].median_ms <= estimates[fastest].median_ms * (1 + NOISE):
            return True
        return bool(np.quantile(_medians(times[schedule], seed + 1) - base, (1 - LEVEL) / 2) <= 0)

    tied = tuple(schedule for schedule in times if schedule in eligible and ties(schedule))
    winner = min(tied, key=lambda schedule: (_distance(schedule, default), schedule.slug))
    return Choice(winner, estimates, tied)


def _distance(schedule: Schedule, default: Schedule) -> int:
    """Return in how many knobs two schedules differ."""
    one, other = values_of(schedule), values_of(default)
    return sum(one[name] != other[name] for name in one)
