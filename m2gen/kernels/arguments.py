"""The kernels' argument lists: one place for their order (templates) and their types (cross-compilation)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from m2gen.kernels.lowering import Direction, Lowering
from m2gen.spec import Dtype
from m2gen.variant import Variant

Constant = int | bool | None

ELEMENT = {Dtype.BF16: "*bf16", Dtype.FP16: "*fp16", Dtype.FP32: "*fp32"}
STATE = "*fp32"
CHECKPOINT = {"float32": STATE, "float16": "*fp16"}


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


def _token_strides(name: str, heads: int, dim: int | None, *, steps: bool = True) -> Iterator[Argument]:
    """Strides of a (B, S, heads, dim) tensor, of a (B, S, heads) one, or without ``steps`` of one without S."""
    yield _stride(f"stride_{name}_b", heads * (dim or 1), steps=steps)
    if steps:
        yield _stride(f"stride_{name}_s", heads * (dim or 1))
    yield _stride(f"stride_{name}_n", dim or 1)
    if dim is not None:
        yield _stride(f"stride_{name}_d", 1)


def _operand_strides(variant: Variant, *, steps: bool = True) -> Iterator[Argument]:
    heads, rows, cols = variant.heads, variant.state_expansion, variant.head_dim
    yield from _token_strides("q", heads.q, rows, steps=steps)
    yield from _token_strides("k", heads.k, rows, steps=steps)
    yield from _token_strides("v", heads.v, cols, steps=steps)
    yield from (_stride("stride_w_n", cols * cols), _stride("stride_w_i", cols), _stride("stride_w_j", 1))
    yield from _token_strides("x", heads.f, None, steps=steps)


def _pointer(name: str, type_: str) -> Argument:
    return Argument(name, type_, even=True)


def _operands(variant: Variant) -> Iterator[Argument]:
    yield from (_pointer(name, ELEMENT[variant.dtype]) for name in "qkvwx")
    if variant.computes_gate:
        yield from (_pointer(name, STATE) for name in ("A_log", "dt_bias"))


def _flag(name: str, value: bool) -> Argument:
    """A choice that each call makes and the kernel is specialised by."""
    return Argument(name, "constexpr", value, flag=True)


def _scans_in_segments(k: Lowering) -> Iterator[Argument]:
    if k.segmented:
        yield _flag("SEGMENTED", True)


def _progress(k: Lowering) -> Iterator[Argument]:
    """Tickets by which programs take the segments of a scan in order."""
    if k.segmented:
        yield _pointer("tickets", "*i32")


def _forward(k: Lowering) -> Iterator[Argument]:
    yield from _operands(k.variant)
    yield Argument("h0", "constexpr")
    yield _pointer("y", STATE if k.y.shared else ELEMENT[k.variant.dtype])
    yield _pointer("ht", STATE)
    yield _pointer("checkpoints", CHECKPOINT[k.checkpoint_dtype])
    yield Argument("cu_seqlens", "constexpr")
    yield from _progress(k)
    yield from _operand_strides(k.variant)
    yield Argument("S")
    yield Argument("intervals")
    yield from (_flag("USE_INITIAL_STATE", False), _flag("IS_VARLEN", False), _flag("SAVE", True))
    yield _flag("ATOMIC", k.forward_adds)
    yield from _scans_in_segments(k)


def _backward(k: Lowering) -> Iterator[Argument]:
    variant, element = k.variant, ELEMENT[k.variant.dtype]
    types = {out.name: STATE if out.shared else element for out in k.gradients}
    yield from _operands(variant)
    yield _pointer("dy", element)
    yield Argument("dht", "constexpr")
    yield _pointer("checkpoints", CHECKPOINT[k.checkpoint_dtype])
    yield _pointer("scratch", STATE) if k.launch.scratch_elements else Argument("scratch", "constexpr")
    yield Argument("cu_seqlens", "constexpr")
    yield from _progress(k)
    for name in ("dq", "dk", "dv", "dw", "df"):
        yield _pointer(name, types.get(name, STATE))
    if k.computes_gate:
        yield from (_pointer(name, STATE) for name in ("dA_log", "ddt_bias"))
    yield _pointer("dh0", STATE)
    yield from _operand_strides(variant)
    yield from _token_strides("dy", variant.total_heads, variant.head_dim)
    yield Argument("S")
    yield Argument("intervals")
    yield Argument("bound", "fp32")
    yield from (_flag("USE_FINAL_STATE_GRADIENT", False), _flag("IS_VARLEN", False))
    yield _flag("ATOMIC", k.backward_adds)
    yield from _scans_in_segments(k)
    yield from (_flag(f"WANT_{name}", True) for name in "QKVWFH")
    yield _flag("CARRIES", True)
    if k.warps_have_slots:
        yield _flag("ALIGNED", k.whole)
    if k.computes_gate:
        yield _flag("WANT_GATE", True)


def _step(k: Lowering) -> Iterator[Argument]:
    variant = k.variant
    rows, cols = variant.state_expansion, variant.head_dim
    yield from _operands(variant)
    yield _pointer("state", STATE)
    yield _pointer("y", ELEMENT[variant.dtype])
    yield from _operand_strides(variant, steps=False)
    yield from (_stride("stride_h_b", variant.total_heads * rows * cols), _stride("stride_h_n", rows * cols))
    yield from (_stride("stride_h_i", cols), _stride("stride_h_j", 1))


def arguments(k: Lowering, direction: Direction) -> tuple[Argument, ...]:
    """Return the parameters of one kernel in order."""
    make = {Direction.FORWARD: _forward, Direction.BACKWARD: _backward, Direction.STEP: _step}
    return tuple(make[direction](k))
