"""Select the winner: among the finalists within noise of the fastest, the one most like the default."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from m2gen.db import Estimate
from m2gen.measure.statistics import as_fast, estimate
from m2gen.schedule import AnySchedule
from m2gen.tune.coordinates import values_of
from m2gen.tune.trial import Samples


@dataclass(frozen=True)
class Selection:
    """The winner among finalists, with their medians."""

    winner: AnySchedule
    estimates: Mapping[AnySchedule, Estimate]
    ties: tuple[AnySchedule, ...]
    """Finalists within noise of the fastest, including the winner and the fastest."""


def select(
    samples: Mapping[AnySchedule, Samples], eligible: Collection[AnySchedule], default: AnySchedule, seed: int
) -> Selection:
    """Return, among the eligible finalists within noise of the fastest, the one most like the default.

    So the winner is the default, if that is eligible, unless another is faster beyond noise.
    """
    times = {schedule: found.call_ms for schedule, found in samples.items()}
    estimates = {schedule: estimate(values, seed) for schedule, values in times.items()}
    fastest = min(eligible, key=lambda schedule: (estimates[schedule].median_ms, schedule.slug))
    tied = tuple(
        schedule
        for schedule in times
        if schedule in eligible and (schedule == fastest or as_fast(times[schedule], times[fastest], seed))
    )
    winner = min(tied, key=lambda schedule: (_distance(schedule, default), schedule.slug))
    return Selection(winner, estimates, tied)


def _distance(schedule: AnySchedule, default: AnySchedule) -> int:
    """Return the number of knobs in which two schedules differ."""
    one, other = values_of(schedule), values_of(default)
    return sum(one[name] != other[name] for name in one)
