"""Importance of knobs: how much each decides how long a call takes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from m2gen.tune.coordinates import AXES, Coordinate, values_of
from m2gen.tune.trial import Trial

FEWEST = 8
"""Fewest passed trials from which importances are computed."""


def importances(trials: Iterable[Trial]) -> dict[str, float]:
    """Return for each knob the part of the variance of log times that its values alone explain (one-way ANOVA's η²).

    A search dwells where calls are fast, so trials are no even sample of a space: this is importance among them.
    Empty where too few trials passed or all took the same.
    """
    passed = [(values_of(trial.schedule), np.log(trial.median_ms)) for trial in trials if trial.median_ms is not None]
    if len(passed) < FEWEST:
        return {}
    times = np.array([time for _, time in passed])
    total = float(((times - times.mean()) ** 2).sum())
    if total == 0:
        return {}
    return {name: _between([values[name] for values, _ in passed], times) / total for name in AXES}


def _between(values: list[Coordinate], times: np.ndarray) -> float:
    """Return the sum of squares between the groups of trials that share a value."""
    groups: dict[Coordinate, list[float]] = {}
    for value, time in zip(values, times, strict=True):
        groups.setdefault(value, []).append(float(time))
    mean = float(times.mean())
    return sum(len(group) * (float(np.mean(group)) - mean) ** 2 for group in groups.values())
