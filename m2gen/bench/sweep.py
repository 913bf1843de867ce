"""Workloads along one axis, and the straight line through their times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from m2gen.bench.entries import BenchWorkload
from m2gen.bench.kinds import Axis
from m2gen.spec import Heads
from m2gen.variant import Variant

LENGTHS = tuple(128 << i for i in range(8))
ROWS = tuple(2 << i for i in range(8))
HEADS = tuple(1 << i for i in range(8))
PER_SM = (0.5, *(float(1 << i) for i in range(11)))
"""Programs per SM, one for each head of each sequence."""
FULL = 8
"""Programs per SM that fill every GPU: more than it holds at once."""
SHORT = 32
"""Sequence length if thousands of sequences must fit into memory."""


@dataclass(frozen=True)
class SweepPoint:
    """One point on the axis."""

    x: int
    workload: BenchWorkload
    fitted: bool = True
    """Whether the line is fitted to it."""


@dataclass(frozen=True)
class Fit:
    """The line ms = intercept + slope x with the least sum of squared relative deviations."""

    intercept_ms: float
    slope_ms: float
    """Milliseconds per unit of x."""
    worst: float
    """The largest relative deviation of a point from the line."""
    points: int

    def at(self, x: float) -> float:
        """Return milliseconds at x."""
        return self.intercept_ms + self.slope_ms * x


def points(axis: Axis, base: BenchWorkload, sm_count: int, tile: int) -> tuple[SweepPoint, ...]:
    """Return the workloads of a sweep from ``base``.

    Up to ``tile`` rows are one program's, so their number says little about time, and the line is not fitted to them.
    """
    variant = base.variant
    heads = variant.total_heads
    if axis is Axis.SEQ:
        return tuple(SweepPoint(seq, replace(base, seq=seq)) for seq in LENGTHS)
    if axis is Axis.ROWS:
        full = replace(base, batch=max(base.batch, -(-FULL * sm_count // heads)))
        grown = ((rows, replace(variant, state_expansion=rows)) for rows in ROWS)
        return tuple(SweepPoint(rows, replace(full, variant=v), rows >= tile) for rows, v in grown)
    if axis is Axis.HEADS:
        batch = FULL * sm_count
        of_heads = ((count * batch, with_heads(variant, count)) for count in HEADS)
        return tuple(SweepPoint(x, replace(base, variant=v, batch=batch, seq=SHORT)) for x, v in of_heads)
    batches = dict.fromkeys(max(1, round(per_sm * sm_count / heads)) for per_sm in PER_SM)
    return tuple(
        SweepPoint(batch * heads, replace(base, batch=batch, seq=SHORT), batch * heads >= FULL * sm_count)
        for batch in batches
    )


def with_heads(variant: Variant, total: int) -> Variant:
    """Return the variant with ``total`` heads: single groups stay, others keep their share as far as it divides."""

    def scaled(count: int) -> int:
        if count == variant.total_heads:
            return total
        most = 1 if count == 1 else max(1, total * count // variant.total_heads)
        return next(n for n in range(most, 0, -1) if total % n == 0)

    counts = zip(Heads.model_fields, map(scaled, variant.heads.counts), strict=True)
    return replace(variant, heads=Heads(**dict(counts)))


def fit(xs: Sequence[float], ms: Sequence[float]) -> Fit | None:
    """Return the line through times, or None for fewer than three points."""
    if len(xs) < 3:
        return None
    x, t = np.asarray(xs, dtype=np.float64), np.asarray(ms, dtype=np.float64)
    columns = np.stack([1 / t, x / t], axis=1)
    (intercept, slope), *_ = np.linalg.lstsq(columns, np.ones_like(t), rcond=None)
    worst = float(np.max(np.abs(t / (intercept + slope * x) - 1)))
    return Fit(float(intercept), float(slope), worst, len(xs))
