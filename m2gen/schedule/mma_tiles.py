"""The tiles of the ``mma`` family's kernels, and the shared memory in which a forward's warps meet."""

from __future__ import annotations

from dataclasses import dataclass

from m2gen.schedule.knobs import Scratch
from m2gen.schedule.tiles import BackwardTile, ForwardTile
from m2gen.variant import MIN_TILE, Variant

FORWARD_REGISTERS = (0, 168, 255)
"""Most registers a thread of a forward with slots: what ptxas likes, three warps a scheduler, and all there are."""


@dataclass(frozen=True)
class MmaForward(ForwardTile):
    """How the forward runs."""

    slots: bool = False
    """Whether each step of an iteration has a slot of the products that make k v^T and y. Where the backward has slots,
    too, with as many rows and warps, since both kernels then have one layout."""
    registers: int = 0
    """Most registers a thread where it has slots, 0 for as many as ptxas likes: with more, loads and products are on
    their way for longer, and fewer programs are."""

    @property
    def slug(self) -> str:
        return super().slug + (f"t{self.registers or ''}" if self.slots else "")


@dataclass(frozen=True)
class MmaBackward(BackwardTile):
    """How the backward runs."""

    scratch: Scratch = Scratch.L2
    xorsign: bool = False
    """Whether what is carried is clamped by one instruction, which not every GPU has, in place of two."""

    @property
    def slug(self) -> str:
        scratch = {Scratch.L2: "", Scratch.SHARED: "s", Scratch.SLOTS: "t"}[self.scratch]
        return super().slug + scratch + ("x" if self.xorsign else "")


def sums_bytes(variant: Variant, part: MmaForward) -> int:
    """Return the shared memory in which a forward's warps meet with what they have summed of y, 8 rows a warp and step.

    Only warps that all have rows of their own, and steps that share their sums, meet there.
    """
    together = part.unroll > 1 and not part.unroll & (part.unroll - 1)
    if part.slots or not together or not 1 < part.warps <= part.rows // MIN_TILE:
        return 0
    return part.unroll * part.warps * 8 * variant.padded_cols * 4
