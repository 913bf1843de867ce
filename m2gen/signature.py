"""The kernels' argument lists: one place for their order (templates) and their types (cross-compilation)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from m2gen.outputs import backward_outputs, forward_output
from m2gen.schedule import Schedule
from m2gen.spec import Dtype
from m2gen.variant import Variant

Constant = int | bool | None

ELEMENT = {Dtype.BF16: "*bf16", Dtype.FP16: "*fp16", Dtype.FP32: "*fp32"}
STATE = "*fp32"


class Direction(StrEnum):
    """Which of a variant's two kernels."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Argument:
    """One kernel parameter as a training step on contiguous tensors passes it."""

    name: str
    type: str = "i32"
    """Triton's name of the type; ``constexpr`` where a call fixes the value."""
    value: Constant = None
    flag: bool = False
    """Declared ``tl.constexpr`` in the kernel, rather than specialised by its value."""

    even: bool = False
    """A multiple of 16, which Triton specialises on."""


def _stride(name: str, elements: int, *, steps: bool = False) -> Argument:
    """Return a stride of a contiguous tensor: that many elements, times the number of steps for a batch stride."""
    if elements == 1 and not steps:
        return Argument(name, "constexpr", 1)
    return Argument(name, even=elements % 16 == 0)


def _token_strides(name: str, heads: int, dim: int | None) -> Iterator[Argument]:
    """Strides of a (B, S, heads, dim) tensor, or of a (B, S, heads) one."""
    yield _stride(f"{name}_b", heads * (dim or 1), steps=True)
    yield _stride(f"{name}_s", heads * (dim or 1))
    yield _stride(f"{name}_n", dim or 1)
    if dim is not None:
        yield _stride(f"{name}_d", 1)


def _operand_strides(variant: Variant) -> Iterator[Argument]:
    heads, rows, cols = variant.heads, variant.state_expansion, variant.head_dim
    yield from _token_strides("q", heads.q, rows)
    yield from _token_strides("k", heads.k, rows)
    yield from _token_strides("v", heads.v, cols)
    yield from (_stride("w_n", cols * cols), _stride("w_i", cols), _stride("w_j", 1))
    yield from _token_strides("f", heads.f, None)


def _pointer(name: str, type_: str) -> Argument:
    return Argument(name, type_, even=True)


def _operands(element: str) -> Iterator[Argument]:
    return (_pointer(name, element) for name in "qkvwf")


def _forward(variant: Variant, schedule: Schedule) -> Iterator[Argument]:
    element = ELEMENT[variant.dtype]
    y = forward_output(variant, schedule)
    yield from _operands(element)
    yield Argument("h_first", "constexpr")
    yield _pointer("y", STATE if y.shared else element)
    yield _pointer("h_last", STATE)
    yield _pointer("checkpoints", STATE)
    yield Argument("cu_seqlens", "constexpr")
    yield from _operand_strides(variant)
    yield Argument("S")
    yield Argument("intervals")
    yield Argument("HAS_FIRST", "constexpr", False, flag=True)
    yield Argument("PACKED", "constexpr", False, flag=True)
    yield Argument("SAVE", "constexpr", True, flag=True)


def _backward(variant: Variant, schedule: Schedule) -> Iterator[Argument]:
    element = ELEMENT[variant.dtype]
    outputs = {out.name: STATE if out.shared else element for out in backward_outputs(variant, schedule)}
    yield from _operands(element)
    yield _pointer("dy", element)
    yield Argument("dh_last", "constexpr")
    yield _pointer("checkpoints", STATE)
    yield _pointer("scratch", STATE) if schedule.two_level else Argument("scratch", "constexpr")
    yield Argument("cu_seqlens", "constexpr")
    for name in ("dq", "dk", "dv", "dw", "df"):
        yield _pointer(name, outputs.get(name, STATE))
    yield _pointer("dh_first", STATE)
    yield from _operand_strides(variant)
    yield from _token_strides("dy", variant.total_heads, variant.head_dim)
    yield Argument("S")
    yield Argument("intervals")
    yield Argument("bound", "fp32")
    yield Argument("HAS_LAST", "constexpr", False, flag=True)
    yield Argument("PACKED", "constexpr", False, flag=True)


def arguments(variant: Variant, schedule: Schedule, direction: Direction) -> tuple[Argument, ...]:
    """Return the parameters of one kernel in order."""
    make = _forward if direction is Direction.FORWARD else _backward
    return tuple(make(variant, schedule))
