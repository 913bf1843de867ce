"""Statistics of times: medians with bootstrapped intervals, and whether two differ by more than noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from m2gen.db import Estimate

RESAMPLES = 2000
LEVEL = 0.95
NOISE = 0.005
"""Fraction of a median that is noise for any number of samples: sessions differ by as much (docs/performance.md)."""


def estimate(samples: Sequence[float], seed: int) -> Estimate:
    """Return the median of samples in milliseconds and its bootstrapped 95 % interval."""
    median = float(np.median(np.asarray(samples)))
    low, high = _interval((samples,), _median, seed)
    return Estimate(median, min(low, median), max(high, median))


def difference(one: Sequence[float], other: Sequence[float], seed: int) -> float:
    """Return the upper end of the 95 % interval of the difference of two medians, as a fraction of the first."""

    def apart(first: Any, second: Any, axis: int = -1) -> Any:
        return np.abs(np.median(second, axis=axis) / np.median(first, axis=axis) - 1)

    return _interval((one, other), apart, seed, "less")[1]


def as_fast(one: Sequence[float], fastest: Sequence[float], seed: int) -> bool:
    """Return whether ``one`` is within noise of ``fastest``.

    It is if the medians differ by less than ``NOISE``, or if the interval of their difference contains 0.
    """
    if float(np.median(np.asarray(one))) <= float(np.median(np.asarray(fastest))) * (1 + NOISE):
        return True

    def slower(first: Any, second: Any, axis: int = -1) -> Any:
        return np.median(first, axis=axis) - np.median(second, axis=axis)

    return _interval((one, fastest), slower, seed)[0] <= 0


def _median(samples: Any, axis: int = -1) -> Any:
    return np.median(samples, axis=axis)


def _interval(
    samples: Sequence[Sequence[float]], statistic: Callable[..., Any], seed: int, alternative: str = "two-sided"
) -> tuple[float, float]:
    """Return the ends of the percentile bootstrap's interval of a statistic.

    Samples of as many calls are paired: rounds alternate, so that the calls of one place ran under the same clocks.
    """
    from scipy.stats import bootstrap

    data = [np.asarray(values, dtype=np.float64) for values in samples]
    if min(map(len, data)) < 2:  # nothing to draw from
        value = float(statistic(*data))
        return value, value
    paired = len(data) > 1 and len({len(values) for values in data}) == 1
    options: dict[str, Any] = {"paired": paired, "method": "percentile", "alternative": alternative}
    found = bootstrap(
        data,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        vectorized=True,
        rng=np.random.default_rng(seed),
        **options,
    ).confidence_interval
    return float(found.low), float(found.high)
