"""How per-step tensors are written when one or several programs contribute to an element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from m2gen.runtime.launch_plan import PerStep
from m2gen.schedule import ForwardTile, MmaBackward, PortableBackward, Warpgroup
from m2gen.variant import Variant


@dataclass(frozen=True)
class Output:
    """One per-step tensor, and where programs write it.

    A single contributor stores the element itself. Several either add to a float32 buffer of the final shape
    (``ATOMIC`` in the kernel), or store a float32 row each, head by head and part by part, which another kernel sums.
    """

    name: str
    total: int
    """Heads that programs run over: N."""
    groups: int
    """Heads of this tensor."""
    parts: int
    """Programs that share one head's sum over rows; 1 where rows are not summed."""
    dim: int | None
    """Extent of the last dim; None for a scalar per head."""

    @property
    def flag(self) -> str:
        """Name of the kernel's flag that this gradient is wanted."""
        return f"WANT_{self.name[1:].upper()}"

    @property
    def contributors(self) -> int:
        return self.parts * (self.total // self.groups)

    @property
    def shared(self) -> bool:
        return self.contributors > 1

    def _scaled(self, index: str) -> str:
        return index if self.dim is None else f"{index} * {self.dim}"

    @property
    def begin(self) -> str:
        """Offset of step 0's row."""
        if not self.shared:
            return self._scaled(f"(token * {self.total} + n)")
        head = "n" if self.total == self.groups else f"n // {self.total // self.groups}"
        row = f"((token * {self.total} + n) * {self.parts} + part)" if self.parts > 1 else f"(token * {self.total} + n)"
        return f"{self._scaled(f'(token * {self.groups} + {head})')} if ATOMIC else {self._scaled(row)}"

    @property
    def stride(self) -> str:
        """Elements between steps."""
        partial = self.total * self.parts * (self.dim or 1)
        return f"{self.groups * (self.dim or 1)} if ATOMIC else {partial}" if self.shared else str(partial)

    def write(self, address: str, value: str, mask: str | None, inside: str | None = None) -> str:
        """Return the statement that writes one step's ``value``, where ``mask`` holds and only if ``inside`` does."""
        if inside:
            mask = f"tl.where({inside}, {mask}, False)" if mask else inside
        if self.shared:
            return f"contribute({address}, {value}, {mask}, ATOMIC)"
        return f"tl.store({address}, {value}, mask={mask})"

    @property
    def per_step(self) -> PerStep:
        """What launchers must know of it."""
        return PerStep(self.groups, self.contributors, () if self.dim is None else (self.dim,))


class Gradients(NamedTuple):
    """How the gradients of per-step operands are written."""

    dq: Output
    dk: Output
    dv: Output
    df: Output


def y_of(variant: Variant, part: ForwardTile | Warpgroup) -> Output:
    """Return how y is written: rows are summed, and every head has its own."""
    total = variant.total_heads
    return Output("y", total, total, part.parts(variant), variant.head_dim)


def gradients_of(variant: Variant, part: PortableBackward | MmaBackward | Warpgroup) -> Gradients:
    """Return how gradients are written; dv and df sum over rows, all sum over the heads of a group."""
    heads, total, parts = variant.heads, variant.total_heads, part.parts(variant)
    return Gradients(
        Output("dq", total, heads.q, 1, variant.state_expansion),
        Output("dk", total, heads.k, 1, variant.state_expansion),
        Output("dv", total, heads.v, parts, variant.head_dim),
        Output("df", total, heads.f, parts, None),
    )
