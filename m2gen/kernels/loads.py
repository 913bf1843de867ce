"""What the warpgroup kernels load for a whole interval, a step to a row, and keep in shared memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vector:
    """An operand that has a vector for every step."""

    name: str
    element: str
    """What the number of an element is called: a row's or a column's."""
    extent: str
    plain: bool = True
    """Whether it lies in shared memory as it is loaded."""
    tile: bool = False
    """Whether it lies there as an operand of products."""
    step_by_step: bool = True
    """Whether a step reads its own."""

    @property
    def copies(self) -> dict[str, str]:
        """Return what is kept of it in shared memory, and each copy's layout."""
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
    Vector("v", "col", "V", tile=True),
    Vector("dy", "col", "V"),
)
