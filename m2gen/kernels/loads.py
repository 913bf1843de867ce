"""Operands that wgmma kernels load for a whole interval, one step a row, and keep in shared memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vector:
    """An operand that has a vector for every step."""

    name: str
    element: str
    """Name of the index of an element: ``row`` or ``col``."""
    extent: str
    plain: bool = True
    """Whether shared memory has a copy as loaded."""
    tile: bool = False
    """Whether shared memory has a copy as an operand of products."""
    step_by_step: bool = True
    """Whether each step reads its own vector alone."""

    @property
    def copies(self) -> dict[str, str]:
        """Return the copies in shared memory by name, and their layouts."""
        found = {f"{self.name}_loaded": "PLAIN"} if self.plain else {}
        return {**found, f"{self.name}_tile": "OPERANDS"} if self.tile else found


FORWARD_VECTORS = (
    Vector("q", "row", "K"),
    Vector("k", "row", "K", step_by_step=False),
    Vector("v", "col", "V", plain=False, tile=True, step_by_step=False),
)
BACKWARD_VECTORS = (
    Vector("q", "row", "K"),
    Vector("k", "row", "K"),
    Vector("v", "col", "V"),
    Vector("dy", "col", "V"),
)
