"""Registers that a kernel's tiles take: if they alone exceed a thread's share, something spills."""

from __future__ import annotations

from dataclasses import dataclass

from m2gen.kernels.lowering import Direction, Lowering
from m2gen.variant import MIN_TILE

SLOT_TILES = 4
"""Tiles of the state that a step of slots has in registers: the gradient, that carried, the candidate and zeros."""


@dataclass(frozen=True)
class Demand:
    """32-bit registers a thread."""

    states: int
    """For tiles of the state: the forward's three, or the backward's two a step of its chunk and three more."""
    weights: int
    """For the state weight as an operand, twice in the backward, which also sums its gradient. Warpgroups read their
    operands from shared memory."""


def demand_of(k: Lowering, direction: Direction, warp_size: int = 32) -> Demand:
    """Return what one kernel's tiles take."""
    cols, operand = k.variant.padded_cols, 1.0 if k.single else 0.5
    if k.wgmma:
        operand = 0.0
    rows, warps, tiles, weights = k.forward.rows, k.forward.warps, 3, operand
    if direction == Direction.BACKWARD and k.warps_have_slots:  # states are in shared memory, the weight in every warp
        return Demand(
            SLOT_TILES * k.backward.rows * cols // (k.backward.warps * warp_size), 2 * cols * MIN_TILE // warp_size
        )
    if direction == Direction.BACKWARD:
        rows, warps, tiles, weights = k.backward.rows, k.backward.warps, 2 * k.backward.chunk + 3, 2 * operand + 1
    threads = warps * warp_size
    return Demand(tiles * rows * cols // threads, int(weights * cols * cols) // threads)
