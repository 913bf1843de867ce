"""What the tiles of a kernel alone take of the registers: from above a thread's share, something spills."""

from __future__ import annotations

from dataclasses import dataclass

from m2gen.schedule import ForwardSchedule, Layouts, Part
from m2gen.spec import Dtype
from m2gen.variant import Variant


@dataclass(frozen=True)
class Demand:
    """32-bit registers a thread."""

    states: int
    """Of tiles of the state: the forward's three, or the backward's two a step of its chunk and three more."""
    weights: int
    """Of the state weight as an operand, twice in the backward, which also sums its gradient. Products of warpgroups
    read their operand from shared memory."""


def demand_of(variant: Variant, part: Part, warp_size: int = 32, layouts: Layouts = Layouts.AUTO) -> Demand:
    """Return what one kernel's tiles take."""
    threads = part.warps * warp_size
    cols, operand = variant.padded_cols, 1.0 if variant.dtype is Dtype.FP32 else 0.5
    if layouts is Layouts.WARPGROUP:
        operand = 0.0
    if isinstance(part, ForwardSchedule):
        tiles, weights = 3, operand
    else:
        tiles, weights = 2 * part.chunk + 3, 2 * operand + 1
    return Demand(tiles * part.rows * cols // threads, int(weights * cols * cols) // threads)
