"""Linear layouts: each bit of a register's, a lane's or a warp's number adds an offset to an element's index."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


def _bases(steps: Iterable[tuple[int, ...]]) -> str:
    return f"[{', '.join(str(list(step)) for step in steps)}]"


@dataclass(frozen=True)
class Linear:
    """A linear layout; printed as the Gluon expression that makes it."""

    shape: tuple[int, ...]
    registers: tuple[tuple[int, ...], ...]
    lanes: tuple[tuple[int, ...], ...]
    warps: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        first = f"reg_bases={_bases(self.registers)}, lane_bases={_bases(self.lanes)},"
        rest = f"warp_bases={_bases(self.warps)}, block_bases=[], shape={list(self.shape)},"
        return f"gl.DistributedLinearLayout(\n    {first}\n    {rest}\n)"


def powers(first: int, end: int) -> list[int]:
    """Return first, 2 first, 4 first, ... below end."""
    return [first << bit for bit in range((end // first).bit_length() - 1)]
