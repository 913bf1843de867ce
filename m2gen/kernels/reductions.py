"""Sums over the lanes of a warp that the steps of an iteration share: butterfly reductions, round by round.

A lane of a tile has rows l // 4 and l // 4 + 8, and columns 2 (l % 4) and the next (``m2gen.kernels.layouts``). Summed
step by step, every step would take every round. Together, each round halves the sums that a lane goes on with: it hands
over what it has of one step for what another lane has of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from m2gen.kernels.layouts import warps_down
from m2gen.schedule import Family, Schedule
from m2gen.spec import Dtype
from m2gen.variant import Variant


class Sums(StrEnum):
    """How a program sums y over rows."""

    EACH = "each"
    """Step by step, by the compiler's reduction."""
    BUTTERFLY = "butterfly"
    """All steps of an iteration together, by rounds of shuffles: where no two warps share a sum."""
    MEMORY = "memory"
    """All steps of an iteration together, in shared memory: where every warp has rows of its own."""
    SLOTS = "slots"
    """All steps of an iteration by products, in which each has a slot."""


@dataclass(frozen=True)
class Round:
    """One round of a butterfly: lanes whose row (or column) differs in one bit shuffle their sums."""

    axis: str
    """Index that the bit belongs to: ``row`` or ``col``."""
    bit: int
    lanes: int
    """Bit of the lane's number that the shuffle flips."""
    pairs: tuple[tuple[int, int], ...]
    """Pairs of steps to shuffle: a lane goes on with the first or, where its bit is set, with the second. Empty where a
    lane has one sum left, which is added to that of the other lane."""


ROWS = (("row", 4, 16), ("row", 2, 8), ("row", 1, 4))
"""Eight lanes have different rows."""
COLS = (("col", 2, 2), ("col", 1, 1))
"""Four lanes have different columns."""


def rounds(steps: int, shuffles: Iterable[tuple[str, int, int]]) -> tuple[Round, ...]:
    """Return the rounds that leave every lane the sum of one of ``steps``, a power of two."""
    found = []
    for axis, bit, lanes in shuffles:
        steps //= 2
        found.append(Round(axis, bit, lanes, tuple((i, i + steps) for i in range(steps))))
    return tuple(found)


@dataclass(frozen=True)
class Reductions:
    """How the kernels of one variant and schedule sum within a program."""

    variant: Variant
    schedule: Schedule

    @property
    def _lanes_known(self) -> bool:
        return self.schedule.family is Family.MMA

    @property
    def y(self) -> Sums:
        part = self.schedule.forward
        if part.slots:
            return Sums.SLOTS
        if not self._lanes_known or part.unroll < 2 or part.unroll & (part.unroll - 1):
            return Sums.EACH
        if warps_down(part) == 1:
            return Sums.BUTTERFLY if part.unroll <= 8 else Sums.EACH
        return Sums.MEMORY if part.warps == warps_down(part) else Sums.EACH

    @property
    def y_parts(self) -> int:
        """Sums of a step's columns that meet in shared memory: of every warp, those of the lanes of eight rows."""
        return 8 * self.schedule.forward.warps

    @property
    def together(self) -> bool:
        """Whether the steps of a chunk share the sums of gradients, by butterflies: where one warp has a whole tile.

        Then each step's operands make room for later ones. Elsewhere all loads of a chunk come first, since barriers
        would have a warp wait for what it has just asked for (docs/performance.md).
        """
        part = self.schedule.backward
        return self._lanes_known and part.warps == 1 and part.chunk in (2, 4) and not self.schedule.slots

    @property
    def df_together(self) -> bool:
        """Whether df is one of these: a gate that the kernel computes has slopes of its own at every step."""
        return self.together and not self.variant.computes_gate

    @property
    def by_product(self) -> bool:
        """Whether dq and dk are sums over columns that tensor cores make, of 11 bits of H and D.

        That loses a tenth of what bfloat16 results lose when they are rounded, and much of what float16 ones do.
        """
        return self.together and self.variant.dtype is Dtype.BF16

    @property
    def y_rounds(self) -> tuple[Round, ...]:
        return rounds(self.schedule.forward.unroll, ROWS)

    @property
    def row_rounds(self) -> tuple[Round, ...]:
        return rounds(self.schedule.backward.chunk, ROWS)

    @property
    def col_rounds(self) -> tuple[Round, ...]:
        return rounds(self.schedule.backward.chunk, COLS)

    @property
    def all_rounds(self) -> tuple[Round, ...]:
        return rounds(self.schedule.backward.chunk, (*ROWS, *COLS))

    @property
    def eighths(self) -> tuple[Round, ...]:
        """Rounds in which a warpgroup's lanes each sum an eighth of a step's columns over rows."""
        return rounds(8, ROWS)
