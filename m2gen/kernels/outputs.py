"""How per-step tensors are written when one or several programs contribute to an element."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Output:
    """One per-step tensor: where programs write it, and how the launcher allocates and finishes it.

    A single contributor stores the element itself. Several either add to a float32 buffer of the final shape
    (``ATOMIC`` in the kernel, ``atomic`` in the launcher), or store a float32 row each, head by head and part by part,
    which the launcher sums.
    """

    name: str
    operand: str
    """Tensor of the launcher whose gradient this is, or whose dtype it takes."""
    total: int
    """Heads that programs run over: N."""
    groups: int
    """Heads of this tensor."""
    parts: int
    """Programs that share one head's sum over rows; 1 where rows are not summed."""
    dim: int | None
    """Extent of the last dim; None for a scalar per head."""
    known: bool = False
    """Whether the launcher keeps launches for calls alike."""

    @property
    def flag(self) -> str:
        """Name of the kernel's flag that this gradient is wanted; the launcher's is the same in lower case."""
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
    def step(self) -> str:
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
    def allocate(self) -> str:
        last = "" if self.dim is None else f", {self.dim}"
        if not self.shared:
            return f"q.new_empty(*lead, {self.groups}{last}, dtype={self.operand}.dtype)"
        return f"buffer(q, atomic, lead, {self.groups}, {self.contributors}{last})"

    @property
    def finish(self) -> str:
        if not self.shared:
            return self.name
        known = ", known" if self.known else ""
        rows, end = (self.name, "") if self.dim is not None else (f"{self.name}.unsqueeze(-1)", ".squeeze(-1)")
        dtype = f"{self.operand}.dtype"
        return f"({self.name}.to({dtype}) if atomic else summed({rows}, {dtype}{known}){end})"
