"""How per-step tensors are written when one or several programs contribute to an element."""

from __future__ import annotations

from dataclasses import dataclass

from m2gen.schedule import Reduction, Schedule
from m2gen.variant import Variant


@dataclass(frozen=True)
class Output:
    """One per-step tensor: where programs write it, and how the launcher allocates and finishes it.

    A single contributor stores the element itself. Several either add to a float32 buffer of the final shape, or
    store a float32 row each, head by head and part by part, which the launcher sums.
    """

    name: str
    total: int
    """N: heads that programs run over."""
    groups: int
    """Heads of this tensor."""
    parts: int
    """Programs that share one head's sum over rows; 1 where rows are not summed."""
    dim: int | None
    """Extent of the last dim; None for a scalar per head."""
    reduction: Reduction
    dtype: str
    """Expression of the tensor's final dtype in the launcher."""
    offsets: str
    mask: str

    @property
    def contributors(self) -> int:
        return self.parts * (self.total // self.groups)

    @property
    def shared(self) -> bool:
        return self.contributors > 1

    @property
    def atomic(self) -> bool:
        return self.shared and self.reduction is Reduction.ATOMIC

    @property
    def row(self) -> str:
        """Index of step 0's row, in units of the last dim."""
        if self.atomic:
            head = "n" if self.total == self.groups else f"n // {self.total // self.groups}"
            return f"(token * {self.groups} + {head})"
        if self.parts == 1:
            return f"(token * {self.total} + n)"
        return f"((token * {self.total} + n) * {self.parts} + part)"

    @property
    def step(self) -> int:
        """Elements between steps."""
        rows = self.groups if self.atomic else self.total * self.parts
        return rows * (self.dim or 1)

    @property
    def allocate(self) -> str:
        last = "" if self.dim is None else f", {self.dim}"
        if self.atomic:
            return f"q.new_zeros(*lead, {self.groups}{last}, dtype=torch.float32)"
        if not self.shared:
            return f"q.new_empty(*lead, {self.groups}{last}, dtype={self.dtype})"
        return f"q.new_empty(*lead, {self.groups}, {self.contributors}{last}, dtype=torch.float32)"

    @property
    def finish(self) -> str:
        if not self.shared:
            return self.name
        summed = self.name if self.atomic else f"{self.name}.sum({-1 if self.dim is None else -2})"
        return f"{summed}.to({self.dtype})"


def forward_output(variant: Variant, schedule: Schedule) -> Output:
    """Return how y is written: rows are summed, and every head has its own."""
    total, parts = variant.total_heads, schedule.forward.parts(variant)
    mask = "tl.where(inside, col_mask, False)"
    return Output("y", total, total, parts, variant.head_dim, schedule.forward.reduction, "v.dtype", " + cols", mask)


def backward_outputs(variant: Variant, schedule: Schedule) -> tuple[Output, ...]:
    """Return how dq, dk, dv and df are written; dv and df sum over rows, all sum over the heads of a group."""
    heads, total = variant.heads, variant.total_heads
    parts, reduction = schedule.backward.parts(variant), schedule.backward.reduction
    rows, cols = "tl.where(inside, row_mask, False)", "tl.where(inside, col_mask, False)"
    return (
        Output("dq", total, heads.q, 1, variant.state_expansion, reduction, "q.dtype", " + rows", rows),
        Output("dk", total, heads.k, 1, variant.state_expansion, reduction, "k.dtype", " + rows", rows),
        Output("dv", total, heads.v, parts, variant.head_dim, reduction, "v.dtype", " + cols", cols),
        Output("df", total, heads.f, parts, None, reduction, "forget.dtype", "", "inside"),
    )
