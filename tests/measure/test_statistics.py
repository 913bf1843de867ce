"""Intervals of medians: against order statistics, and pairs against drift that both of them have."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from m2gen.measure.statistics import LEVEL, NOISE, as_fast, difference, estimate


def test_an_interval_is_that_of_order_statistics() -> None:
    """Its ends are where the binomial distribution has them, give or take a rank, and a seed decides them."""
    samples = np.random.default_rng(1).normal(10.0, 1.0, 101)
    found = estimate(list(samples), 7)
    ordered = np.sort(samples)
    low, high = (int(binom.ppf(q, 101, 0.5)) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    assert found.median_ms == ordered[50]
    assert ordered[low - 2] <= found.low_ms <= ordered[low + 2]
    assert ordered[high - 2] <= found.high_ms <= ordered[high + 2]
    assert estimate(list(samples), 7) == found


@pytest.mark.parametrize("samples", [[2.0], [2.0] * 10])
def test_what_does_not_vary_has_no_width(samples: list[float]) -> None:
    """One sample, and many that are the same."""
    found = estimate(samples, 0)
    assert (found.low_ms, found.median_ms, found.high_ms) == (2.0, 2.0, 2.0)
    assert difference(samples, samples, 0) == 0.0
    assert as_fast(samples, samples, 0)


def test_pairs_see_through_common_drift() -> None:
    """A call that is 2 % slower in each round is slower, though rounds differ by 20 %; without pairs that is noise."""
    drift = np.linspace(1.0, 1.2, 40)
    fast, slow = drift * 1.0, drift * (1 + 4 * NOISE)
    assert not as_fast(list(slow), list(fast), 0)
    assert as_fast(list(slow[1:]), list(fast), 0), "of unequal numbers"
    assert difference(list(fast), list(slow), 0) == pytest.approx(4 * NOISE, abs=NOISE)
    assert difference(list(fast), list(slow[1:]), 0) > 8 * NOISE
