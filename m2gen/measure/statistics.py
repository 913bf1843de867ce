"""Statistics of times: medians with bootstrapped intervals, and whether two differ by more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from m2gen.db import Estimate

RESAMPLES = 2000
LEVEL = 0.95
NOISE = 0.005
"""Fraction of a median that is noise for any number of samples: sessions differ by as much (docs/performance.md)."""


def _medians(samples: Sequence[float], seed: int) -> Any:
    """Return the medians of bootstrap resamples."""
    values = np.asarray(samples, dtype=np.float64)
    generator = np.random.default_rng(seed)
    return np.median(values[generator.integers(0, len(values), (RESAMPLES, len(values)))], axis=1)


def estimate(samples: Sequence[float], seed: int) -> Estimate:
    """Return the median of samples in milliseconds and its bootstrapped 95 % interval."""
    low, high = np.quantile(_medians(samples, seed), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    median = float(np.median(np.asarray(samples)))
    return Estimate(median, min(float(low), median), max(float(high), median))


def difference(one: Sequence[float], other: Sequence[float], seed: int) -> float:
    """Return the upper end of the 95 % interval of the difference of two medians, as a fraction of the first."""
    apart = np.abs(_medians(other, seed + 1) / _medians(one, seed) - 1)
    return float(np.quantile(apart, LEVEL))


def as_fast(one: Sequence[float], fastest: Sequence[float], seed: int) -> bool:
    """Return whether ``one`` is within noise of ``fastest``.

    It is if the medians differ by less than ``NOISE``, or if the interval of their difference contains 0.
    """
    if float(np.median(np.asarray(one))) <= float(np.median(np.asarray(fastest))) * (1 + NOISE):
        return True
    return bool(np.quantile(_medians(one, seed + 1) - _medians(fastest, seed), (1 - LEVEL) / 2) <= 0)
