"""Intervals of medians: against order statistics, and pairs against drift that both of them have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, bootstrap

from m2gen.measure.statistics import NOISE, RESAMPLES, as_fast, difference, estimate


def test_an_interval_is_that_of_order_statistics() -> None:
    """Its ends are where the binomial distribution has them, give or take a rank, and a seed decides them."""
    samples = np.random.default_rng(1).normal(10.0, 1.0, 101)
    found = estimate(list(samples), 7)
    ordered = np.sort(samples)
    low, high = (int(binom.ppf(q, 101, 0.5)) for q in (0.025, 0.975))
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


def test_a_difference_has_no_sign() -> None:
    """A call that takes half the time differs by as much as one that takes one and a half times it."""
    assert difference([2.0] * 20, [1.0] * 20, 0) == difference([2.0] * 20, [3.0] * 20, 0) == 0.5


@pytest.mark.parametrize(("slower", "within"), [(0.8 * NOISE, True), (1.2 * NOISE, False)])
def test_noise_is_a_part_of_the_fastest(slower: float, within: bool) -> None:
    """What never varies is as fast as the fastest while the medians differ by less than sessions do."""
    assert as_fast([1.0 + slower] * 20, [1.0] * 20, 0) is within


def test_a_difference_has_one_end() -> None:
    """It is the upper end of an interval that is open below: 5 % of resamples are above it, not 2.5 %."""
    one, other = (np.random.default_rng(seed).normal(10.0, 0.5, 60) for seed in (1, 2))

    def apart(first: Any, second: Any, axis: int = -1) -> Any:
        return np.abs(np.median(second, axis=axis) / np.median(first, axis=axis) - 1)

    resamples = bootstrap(
        (one, other), apart, n_resamples=RESAMPLES, paired=True, method="percentile", rng=np.random.default_rng(7)
    ).bootstrap_distribution
    found = difference(list(one), list(other), 7)
    assert np.mean(resamples > found) == pytest.approx(0.05, abs=0.005)
