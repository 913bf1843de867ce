"""Launch the kernels around a layer's recurrence: its convolution, gate and epilogue, forwards and backwards."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import relaunch
from .layer_plan import LayerPlan, layer_plan_of
from .relaunch import Known, Launched

OPTIONS = {"enable_fp_fusion": True}
"""Products and sums are fused to one operation, whatever Triton or its environment does by itself."""


class LayerKernels(NamedTuple):
    """A module of the kernels around the recurrence, and what is known of launches of calls alike."""

    module: ModuleType
    known: Known | None = None

    @property
    def plan(self) -> LayerPlan:
        return layer_plan_of(self.module)

    def launch(
        self,
        name: str,
        programs: int,
        warps: int,
        pointers: Sequence[Tensor | None],
        numbers: Sequence[float],
        registers: int = 0,
        **flags: Any,
    ) -> None:
        """Launch a kernel by name on pointers, numbers and flags in the order of its parameters; of 0, none.

        A thread has at most so many ``registers``, if that is not 0.
        """
        again = None if self.known is None else self.known.get(name)
        if again is not None:
            again.launch(pointers)
        elif programs:
            kernel = getattr(self.module, f"m2rnn_{name}_kernel")
            options = {**OPTIONS, "maxnreg": registers} if registers else OPTIONS
            compiled = kernel[(programs, 1, 1)](*pointers, *numbers, **flags, num_warps=warps, **options)
            if self.known is not None:
                first = next(x for x in pointers if x is not None)
                launched = Launched(compiled, programs, (*numbers, *flags.values()), first.get_device())
                relaunch.keep(self.known, name, launched)


class Convolution(NamedTuple):
    """A depthwise causal convolution (C, 1, width) with its bias and activation; without a weight, only the latter."""

    weight: Tensor | None
    bias: Tensor | None
    silu: bool

    @property
    def width(self) -> int:
        return 0 if self.weight is None else self.weight.shape[-1]


class Epilogue(NamedTuple):
    """What becomes of y: D (N, V) and the norm's weight, where there are any, and whether there is a norm."""

    skip: Tensor | None
    weight: Tensor | None
    norm: bool
    eps: float


class Tokens(NamedTuple):
    """Where tokens are in their sequences."""

    total: int
    steps: int
    """Steps of each sequence; all tokens of a packed batch."""
    place: Tensor | None = None
    """Steps before a token of a packed batch in its sequence, (T,)."""
    sequence: Tensor | None = None
    """The sequence of a token of a packed batch, (T,)."""


def tokens_of(projected: Tensor, cu_seqlens: Tensor | None) -> Tokens:
    """Return where the tokens of projected (B, S, P), or (T, P) with cu_seqlens, are; inside it whatever these hold."""
    if cu_seqlens is None:
        return Tokens(projected.shape[0] * projected.shape[1], projected.shape[1])
    count = projected.shape[0]
    token = torch.arange(count, device=projected.device, dtype=torch.int32)
    offsets = cu_seqlens.to(torch.int32)
    sequence = torch.bucketize(token, offsets[1:], right=True, out_int32=True).clamp_(max=max(offsets.shape[0] - 2, 0))
    place = token - offsets[:-1].index_select(0, sequence) if count else token
    return Tokens(count, count, torch.minimum(place.clamp_(min=0), token), sequence)


def convolve(kernels: LayerKernels, a: Tensor, conv: Convolution, before: Tensor | None, tokens: Tokens) -> Tensor:
    """Return q, k and v (T, channels) of the channels ``a`` (T, channels) of a projection; rows lie on 32 bytes."""
    plan = kernels.plan
    rows, cols, warps = plan.conv
    out = a.new_empty(tokens.total, rounded(plan.channels, 16))
    kernels.launch(
        "convolve", ceil(tokens.total, rows) * ceil(plan.channels, cols), warps,
        (a, conv.weight, conv.bias, before, tokens.place, tokens.sequence, out),
        (tokens.total, tokens.steps, a.stride(0), out.stride(0)),
        WIDTH=conv.width, SILU=conv.silu, IS_VARLEN=tokens.place is not None,
    )  # fmt: skip
    return out[:, : plan.channels]


class ConvolutionGradients(NamedTuple):
    """Gradients of a convolution's parameters, in float32."""

    weight: Tensor | None
    bias: Tensor | None


def convolve_backward(
    kernels: LayerKernels,
    a: Tensor,
    da: Tensor,
    conv: Convolution,
    before: Tensor | None,
    tokens: Tokens,
    gradients: tuple[Tensor, Tensor, Tensor],
    bypass: tuple[Tensor | None, Tensor | None],
) -> ConvolutionGradients:
    """Write ``da`` from the gradients of q, k and v, to whose last ``bypass`` adds D du; return the parameters'."""
    plan = kernels.plan
    steps, cols, warps = plan.unconv
    chunks = ceil(tokens.steps, steps)
    programs = chunks * (tokens.total // tokens.steps) if tokens.steps else 0
    dweight = dbias = None
    if conv.weight is not None:
        dweight = a.new_empty(programs, conv.width, plan.channels, dtype=torch.float32)
    if conv.bias is not None:
        dbias = a.new_empty(programs, plan.channels, dtype=torch.float32)
    du, skip = bypass
    kernels.launch(
        "convolve_backward", programs * ceil(plan.channels, cols), warps,
        (a, conv.weight, conv.bias, before, tokens.place, tokens.sequence, *gradients, du, skip, da, dweight, dbias),
        (tokens.steps, chunks, a.stride(0), da.stride(0)),
        WIDTH=conv.width, SILU=conv.silu, IS_VARLEN=tokens.place is not None,
    )  # fmt: skip
    return ConvolutionGradients(
        None if dweight is None else dweight.sum(0).T[:, None].contiguous(), None if dbias is None else dbias.sum(0)
    )


def decay(kernels: LayerKernels, x: Tensor, A_log: Tensor, dt_bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the forget gate (T, Nf) of its inputs x (T, Nf)."""
    rows, warps = kernels.plan.decay
    f = x.new_empty(x.shape, dtype=dtype)
    kernels.launch("decay", ceil(x.shape[0], rows), warps, (x, A_log, dt_bias, f), (x.shape[0], x.stride(0)))
    return f


def decay_backward(
    kernels: LayerKernels, x: Tensor, A_log: Tensor, dt_bias: Tensor, df: Tensor, dx: Tensor
) -> tuple[Tensor, Tensor]:
    """Write ``dx`` from the gate's gradient df (T, Nf); return the gradients of A_log and dt_bias."""
    rows, warps = kernels.plan.decay
    programs = ceil(x.shape[0], rows)
    parts = x.new_empty(programs, 2, x.shape[1], dtype=torch.float32)
    numbers = (x.shape[0], x.stride(0), dx.stride(0))
    kernels.launch("decay_backward", programs, warps, (x, A_log, dt_bias, df, dx, parts), numbers)
    dA_log, ddt_bias = parts.sum(0)
    return dA_log, ddt_bias


def finish(kernels: LayerKernels, y: Tensor, v: Tensor, g: Tensor, epilogue: Epilogue) -> Tensor:
    """Return the output projection's input (T, inner) of y (T, inner), v and g, whose rows may be apart."""
    rows, warps = kernels.plan.finish
    out = y.new_empty(y.shape)
    kernels.launch(
        "finish", ceil(y.shape[0], rows), warps, (y, v, g, epilogue.skip, epilogue.weight, out),
        (y.shape[0], epilogue.eps, v.stride(0), g.stride(0)), NORM=epilogue.norm,
    )  # fmt: skip
    return out


class FinishGradients(NamedTuple):
    """Gradients of y + D v (T, inner), and in float32 those of D and the norm's weight, (inner,)."""

    du: Tensor
    skip: Tensor | None
    weight: Tensor | None


def finish_backward(
    kernels: LayerKernels, dout: Tensor, y: Tensor, v: Tensor, g: Tensor, epilogue: Epilogue, dg: Tensor
) -> FinishGradients:
    """Write ``dg`` from the result's gradient, and return the other gradients."""
    plan = kernels.plan
    rows, warps = plan.unfinish
    programs = ceil(y.shape[0], rows)
    du = y.new_empty(y.shape)
    dskip, dweight = (
        None if x is None else y.new_empty(programs, plan.inner, dtype=torch.float32)
        for x in (epilogue.skip, epilogue.weight)
    )
    kernels.launch(
        "finish_backward", programs, warps,
        (dout, y, v, g, epilogue.skip, epilogue.weight, du, dg, dskip, dweight),
        (y.shape[0], epilogue.eps, dout.stride(0), v.stride(0), g.stride(0), dg.stride(0)), NORM=epilogue.norm,
    )  # fmt: skip
    return FinishGradients(du, *(None if x is None else x.sum(0) for x in (dskip, dweight)))


def scale(kernels: LayerKernels, x: Tensor, squares: Tensor, size: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return rows x (T, H) over the root of the mean of ``size`` squares, whose sums (T, 1) are given, and 1 / it."""
    rows, warps = kernels.plan.scale
    out, factors = torch.empty_like(x), torch.empty_like(squares)
    numbers = (x.shape[0], x.shape[1], size, eps)
    kernels.launch("scale", ceil(x.shape[0], rows), warps, (x, squares, out, factors), numbers)
    return out, factors


def scale_backward(kernels: LayerKernels, dout: Tensor, x: Tensor, factors: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the sums of squares from that of the result of ``scale`` and its factors."""
    rows, warps = kernels.plan.scale
    dx, dsquares = torch.empty_like(x), torch.empty_like(factors)
    numbers = (x.shape[0], x.shape[1], size)
    kernels.launch("scale_backward", ceil(x.shape[0], rows), warps, (dout, x, factors, dx, dsquares), numbers)
    return dx, dsquares


def ceil(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return (a + b - 1) // b


def rounded(a: int, b: int) -> int:
    """Return the multiple of b from a on."""
    return ceil(a, b) * b
