"""How kernels load the operands of an iteration: step by step or, in the forward, keys and values of all as tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from m2gen.kernels.layouts import outer_on_tensor_cores
from m2gen.kernels.reductions import backward_together
from m2gen.schedule import Schedule
from m2gen.variant import Variant


@dataclass(frozen=True)
class Operand:
    """One operand that every step loads: a vector, or a head's gate."""

    name: str
    place: str
    """What its offset within a step is called."""
    mask: str | None
    """Name of the mask over its elements; None for the gate, which is one number."""

    def offset(self, step: int) -> str:
        """Return the statement that works out where a step's operand lies, from the iteration's first step."""
        start = "" if self.mask is None else f"{self.name}_{self.place} + "
        return f"{self.name}_{step}_{self.place} = {start}{step} * tl.cast({self.name}_s, tl.int64)"

    def load(self, step: int, inside: str | None) -> str:
        """Return the expression that loads a step's operand; ``inside`` says when, None always."""
        address = f"{self.name} + {self.name}_{step}_{self.place}"
        if self.mask is None:
            return f"load_gate({address}, {inside})" if inside else f"tl.load({address}).to(tl.float32)"
        return f"load_vector({address}, {self.mask}, {inside})" if inside else _always(address, self.mask)

    def before(self, step: int) -> str:
        """Return the expression that loads a step's operand of the chunk before the one that is worked on."""
        address = f"{self.name}_at + {step} * before_{self.name}_s"
        if self.mask is None:
            return f"tl.load({address}).to(tl.float32)"
        return _always(f"{address} + {self.name}_{self.place}", self.mask)


@dataclass(frozen=True)
class Tile:
    """An operand of all steps of an iteration, each in a slot of a product's tile."""

    name: str
    operand: str
    word: str
    """What its offsets, its mask and its slots are called."""

    def load(self, first: str | None) -> str:
        """Return the expression that loads the steps from ``first`` on that the sequence has; None for all of them."""
        address, mask = f"{self.operand} + {self.word}_offsets", f"{self.word}_mask"
        if first is None:
            return _always(address, mask)
        return f"load_vector({address}, {mask}, {first}{self.word}_slot < length)"


@dataclass(frozen=True)
class Vector:
    """An operand that a warpgroup loads for a whole interval, a step to a row."""

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


def _always(address: str, mask: str) -> str:
    return f"tl.load({address}, mask={mask}, other=0.0)"


def _names(before: str, after: str, loaded: Sequence[Operand | Tile]) -> str:
    return ", ".join(f"{before}{each.name}{after}" for each in loaded)


def forward_words(schedule: Schedule) -> dict[str, object]:
    """Return what the forward loads, and from what a step has k v^T."""
    q, x = Operand("q", "row", "row_mask"), Operand("x", "at", None)
    if outer_on_tensor_cores(schedule):
        return {
            "forward_names": _names,
            "forward_operands": (q, x),
            "forward_tiles": (Tile("keys", "k", "key"), Tile("values", "v", "value")),
            "forward_outer": lambda step: f"outer_of_slot(keys, values, value_slot, {step}, h)",
        }
    return {
        "forward_names": _names,
        "forward_operands": (q, Operand("k", "row", "row_mask"), Operand("v", "col", "col_mask"), x),
        "forward_tiles": (),
        "forward_outer": lambda step: f"outer(k_{step}, v_{step}, h)",
    }


def backward_words(variant: Variant, schedule: Schedule) -> dict[str, object]:
    """Return when the backward loads the operands of the chunk before the one that it works on.

    Where the steps of a chunk share their sums, which one warp with explicit layouts has alone, each as soon as the
    registers of this chunk's are free: 1.6 % less time than all of them first, for the 7B layer. Elsewhere all loads
    come first, since barriers would have a warp wait for what it has just asked for (docs/performance.md).
    """
    q, k, x = Operand("q", "row", "row_mask"), Operand("k", "row", "row_mask"), Operand("x", "at", None)
    v, dy = Operand("v", "col", "col_mask"), Operand("dy", "col", "col_mask")
    every = (q, k, v, dy, x)
    freed = bool(backward_together(variant, schedule))
    return {
        "backward_operands": every,
        "loads_first": [] if freed else [(each, i) for i in range(schedule.backward.chunk) for each in every],
        "loads_freed": (k, v, x, q, dy) if freed else (),  # those first that are needed first
        "loads_late": [(k, 0), (v, 0), (x, 0)] if freed else [],
        "loads_last": [(q, 0), (dy, 0)] if freed else [],
    }
