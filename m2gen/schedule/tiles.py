"""Knobs that ``portable`` and ``mma`` share: programs may have any number of rows and warps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from m2gen.device import Device
from m2gen.schedule.knobs import MOST_SEGMENTS, Axes, Knobs, Reduction, Tanh, tanh_problems
from m2gen.variant import MIN_TILE, Variant

FORWARD_AXES: Axes = {
    "forward.rows": (16, 32, 64, 128, 256),
    "forward.warps": (1, 2, 4, 8),
    "forward.unroll": (1, 2, 4, 8),
    "forward.reduction": tuple(Reduction),
}
BACKWARD_AXES: Axes = {
    "backward.rows": (16, 32, 64, 128, 256),
    "backward.warps": (1, 2, 4, 8),
    "backward.chunk": (1, 2, 4, 8),
    "backward.reduction": tuple(Reduction),
}
SHARED_AXES: Axes = {"interval": (1, 2, 4, 8, 16, 32, 64, 128), "tanh": tuple(Tanh), "segments": (1, 3, 7)}


@dataclass(frozen=True)
class ForwardTile:
    """How a forward kernel runs."""

    rows: int
    warps: int
    unroll: int
    """Steps an iteration; their operands are loaded one iteration ahead."""
    reduction: Reduction

    def parts(self, variant: Variant) -> int:
        """Return how many programs share one head's state."""
        return variant.padded_rows // self.rows

    @property
    def slug(self) -> str:
        return f"f{self.rows}x{self.warps}u{self.unroll}{self.reduction[0]}"


@dataclass(frozen=True)
class BackwardTile:
    """How a backward kernel runs."""

    rows: int
    warps: int
    chunk: int
    """Steps whose states live in registers between their recomputation and their gradients."""
    reduction: Reduction

    def parts(self, variant: Variant) -> int:
        """Return how many programs share one head's state."""
        return variant.padded_rows // self.rows

    @property
    def slug(self) -> str:
        return f"b{self.rows}x{self.warps}c{self.chunk}{self.reduction[0]}"


def usual_tile(variant: Variant, device: Device) -> tuple[int, int]:
    """Return rows and warps of a program: 32 rows of up to 16 columns, else 16 rows and a warp per 16 columns.

    Above 256 threads a program, a thread's share of the register file is too small for the widest states.
    """
    warps = min(variant.padded_cols // MIN_TILE, 256 // device.warp_size)
    return (min(variant.padded_rows, 32), 1) if warps == 1 else (MIN_TILE, warps)


def most_warps(variant: Variant, rows: int) -> int:
    """Return how many warps have a 16 x 8 tile of a product of their own.

    More would hold copies. Backward kernels of ``mma`` count on there being none: their threads read back from a
    scratch in the L2 what they wrote themselves, with no barrier.
    """
    return max(1, rows // MIN_TILE * (variant.padded_cols // 8))


def tile_problems(schedule: Knobs, variant: Variant, device: Device) -> Iterator[str]:
    """Yield why these knobs serve no kernel of a variant on a device, whatever else the family asks."""
    for direction, part in (("forward", schedule.forward), ("backward", schedule.backward)):
        if not (_power_of_two(part.rows) and MIN_TILE <= part.rows <= variant.padded_rows):
            yield f"{direction}.rows must be a power of two from {MIN_TILE} to {variant.padded_rows}, got {part.rows}"
        if not (_power_of_two(part.warps) and part.warps <= 8):
            yield f"{direction}.warps must be 1, 2, 4 or 8, got {part.warps}"
    steps = {"forward.unroll": schedule.forward.unroll, "backward.chunk": schedule.backward.chunk}
    for name, count in steps.items():
        if not 1 <= count <= 16:
            yield f"{name} must be from 1 to 16, got {count}"
    for name, count in steps.items():
        if schedule.interval < 1 or count < 1 or schedule.interval % count:
            yield f"interval must be a multiple of {name} = {count}, got {schedule.interval}"
    if not 1 <= schedule.segments <= MOST_SEGMENTS:
        yield f"segments must be from 1 to {MOST_SEGMENTS}, got {schedule.segments}"
    yield from tanh_problems(schedule.tanh, variant, device)


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
