"""What launchers allocate for one variant and schedule, and how many programs they launch."""

from __future__ import annotations

from dataclasses import dataclass

from m2gen.schedule import Schedule, Scratch
from m2gen.schedule.slots import across
from m2gen.variant import Variant

SHORT = 64
"""Tokens up to which y's contributors store rows of their own, whatever the schedule says. Fewer than any problem by
which a schedule is tuned, so that the kernels that are timed are those that were verified."""
SUM_ELEMENTS = 256
"""Elements that one warp of the kernel that adds contributors' rows."""


@dataclass(frozen=True)
class Launch:
    """Numbers that launchers need of one variant and schedule."""

    variant: Variant
    schedule: Schedule

    @property
    def forward_programs(self) -> int:
        """Programs of the forward for one sequence."""
        return self.variant.total_heads * self.schedule.forward.parts(self.variant)

    @property
    def backward_programs(self) -> int:
        """Programs of the backward for one sequence."""
        return self.variant.total_heads * self.schedule.backward.parts(self.variant)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.variant.total_heads, self.variant.state_expansion, self.variant.head_dim

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of one sequence's gradients of weights: groups, contributors, and a weight."""
        groups, cols = self.variant.heads.w, self.variant.head_dim
        apart = self.schedule.warps_have_slots and not across(self.variant)
        contributors = self.backward_programs * (self.schedule.backward.warps if apart else 1)
        return groups, contributors // groups, cols, cols

    @property
    def gate_shape(self) -> tuple[int, int]:
        """Shape of one sequence's gradients of a parameter of the gate: groups, and contributors."""
        contributors = self.backward_programs * (self.schedule.interval if self.schedule.warps_have_slots else 1)
        return self.variant.heads.f, contributors // self.variant.heads.f

    @property
    def scratch_elements(self) -> int:
        """Elements of a program's scratch in global memory; 0 where it has none."""
        in_l2 = self.schedule.backward.scratch is Scratch.L2
        return 0 if not in_l2 else self.schedule.scratch_bytes(self.variant) // 4

    @property
    def sum_block(self) -> int:
        """Elements that a program adds contributors' rows of."""
        return SUM_ELEMENTS * self.schedule.forward.warps
