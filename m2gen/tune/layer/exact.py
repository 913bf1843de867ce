"""What kernels around a recurrence should give: by autograd in float64, or rounded as kernels must for budgets.

A budget is derived as that of a recurrence (docs/design.md, section 6): a factor times the largest error of several
draws, plus half an epsilon of the tensor's dtype. Each draw has a grid of its own, and adds tokens one by one, which
errs most, in an order of its own: every tile has another. Some gradients are a handful of numbers, whose error is luck,
so there are more draws than of a recurrence, which cost little here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from m2gen.runtime import reference
from m2gen.runtime.reference import EXACT, Arithmetic
from m2gen.schedule.layer_knobs import LayerKernel
from m2gen.tune.layer.operands import EPS, LayerCase, LayerSizes, Operands
from m2gen.variant import Variant
from m2gen.verify.oracle import APPROXIMATE_TANH_BITS, DRAWS, FACTOR, FUNCTION_BITS, Oracle, relative_error

Results = dict[str, Tensor]
LAYER_DRAWS = 4 * DRAWS


@dataclass(frozen=True)
class _Call:
    """A call whose operands are in the dtype of an arithmetic."""

    shape: LayerSizes
    case: LayerCase
    operands: Operands
    arithmetic: Arithmetic
    seed: int = 0
    """Seed of the order of sums."""

    def __getitem__(self, name: str) -> Tensor:
        return self.operands[name]

    def has(self, name: str) -> bool:
        return name in self.operands

    @property
    def decodes(self) -> bool:
        return self.has("state")

    def columns(self, first: int, count: int) -> Tensor:
        return self["rows"][:, first : first + count]

    @property
    def a(self) -> Tensor:
        """Channels of the convolution."""
        return self.columns(0, self.shape.channels)

    @property
    def x(self) -> Tensor:
        """Inputs of the gate."""
        return self.columns(self.shape.channels + (0 if self.decodes else self.shape.inner), self.shape.variant.heads.f)

    @property
    def g(self) -> Tensor:
        """Output gates, which decoding has after the gate's inputs."""
        return self.columns(self.shape.channels + (self.shape.variant.heads.f if self.decodes else 0), self.shape.inner)

    def silu(self, x: Tensor) -> Tensor:
        return x * self.arithmetic.as_function(torch.sigmoid(x))

    def stored(self, x: Tensor) -> Tensor:
        """Return x as a tensor of the operands' dtype has it."""
        return self.arithmetic.as_operand(x, self.arithmetic.grid)

    def summed(self, x: Tensor) -> Tensor:
        """Return the sum of x (T, ...) over tokens."""
        if self.arithmetic.state is torch.float64:
            return x.sum(0)
        order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(self.seed))
        total = torch.zeros_like(x[0])
        for each in x[order.to(x.device)]:
            total = total + each
        return total

    def per_token(self, name: str) -> Tensor | None:
        """Return a leaf with a parameter for every token, whose gradients ``summed`` adds."""
        return self[name].expand(self["rows"].shape[0], *self[name].shape).clone() if self.has(name) else None


def _convolved(call: _Call, a: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return b (T, channels) of weights (T, channels, 1, width) and biases (T, channels) of every token."""
    width, found = call.case.width, []
    for n, (start, end) in enumerate(call.case.spans):
        inputs = a[start:end]
        total = inputs
        if weight is not None:
            before = call["before"][n] if call.has("before") else a.new_zeros(width - 1, a.shape[1])
            inputs = torch.cat((before, inputs))
            shifts = (inputs[i : i + end - start] * weight[start:end, :, 0, i] for i in range(width))
            total = torch.stack(list(shifts)).sum(0)
        total = total if bias is None else total + bias[start:end]
        found.append(call.silu(total) if call.case.silu else total)
    return torch.cat(found)


def _convolve(call: _Call) -> Results:
    return {"b": call.stored(_convolved(call, call.a, call.per_token("conv_weight"), call.per_token("conv_bias")))}


def _gradients(out: Tensor, incoming: Tensor, leaves: Mapping[str, Tensor | None]) -> Results:
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    return dict(zip(given, torch.autograd.grad(out, list(given.values()), incoming), strict=True))


def _leaf(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().clone().requires_grad_()


def _convolve_backward(call: _Call) -> Results:
    a, weight, bias = (_leaf(x) for x in (call.a, call.per_token("conv_weight"), call.per_token("conv_bias")))
    assert a is not None
    d = torch.cat([call["dq"], call["dk"], call["dv"]], 1)
    if call.has("du"):
        d = d + F.pad(call["du"] * call["skip"].flatten(), (d.shape[1] - call.shape.inner, 0))
    found = _gradients(_convolved(call, a, weight, bias), d, {"da": a, "dconv_weight": weight, "dconv_bias": bias})
    sums = {name: call.summed(x) for name, x in found.items() if name != "da"}
    return {"da": call.stored(found["da"]), **sums}


def _decay(call: _Call) -> Results:
    x, A_log, dt_bias = (_leaf(x) for x in (call.x, call.per_token("A_log"), call.per_token("dt_bias")))
    assert x is not None
    f, _ = reference.forget_gate(x, A_log, dt_bias, call.arithmetic)
    found = _gradients(f, call["df"], {"dx": x, "dA_log": A_log, "ddt_bias": dt_bias})
    sums = {name: call.summed(each) for name, each in found.items() if name != "dx"}
    return {"f": call.stored(f.detach()) if call.case.rounds else f.detach(), "dx": call.stored(found["dx"]), **sums}


def _finished(call: _Call, u: Tensor, g: Tensor, norm: Tensor | None) -> Tensor:
    r = u * call.silu(g)
    if not call.case.epilogue:
        return r
    r = r * call.arithmetic.as_function(torch.rsqrt(r.square().mean(-1, keepdim=True) + EPS))
    return r if norm is None else r * norm


def _sum_with(call: _Call, y: Tensor, v: Tensor, skip: Tensor | None) -> Tensor:
    return y if skip is None else y + skip.reshape(-1, call.shape.inner) * v


def _v(call: _Call) -> Tensor:
    return call["qkv"][:, call.shape.channels - call.shape.inner : call.shape.channels]


def _finish(call: _Call) -> Results:
    u = _sum_with(call, call["y"], _v(call), call.per_token("skip"))
    return {"o": call.stored(_finished(call, u, call.g, call.per_token("norm")))}


def _finish_backward(call: _Call) -> Results:
    y, g, skip, norm = (_leaf(x) for x in (call["y"], call.g, call.per_token("skip"), call.per_token("norm")))
    assert y is not None
    assert g is not None
    out = _finished(call, _sum_with(call, y, _v(call), skip), g, norm)
    found = _gradients(out, call["do"], {"du": y, "dg": g, "dskip": skip, "dnorm": norm})
    return {name: call.stored(x) if name in ("du", "dg") else call.summed(x).flatten() for name, x in found.items()}


def _decode(call: _Call) -> Results:
    """Advance states by a token of each sequence; a sequence without a slot gives zeros."""
    shape, batch = call.shape, call["rows"].shape[0]
    slots = call["indices"].long() if call.has("indices") else torch.arange(batch, device=call["rows"].device)
    there = slots >= 0
    before = replace(call, operands={**call.operands, "before": call["conv"][slots.clamp(min=0)]})
    b = call.stored(_convolved(before, call.a, call.per_token("conv_weight"), call.per_token("conv_bias")))
    heads, dims = shape.variant.heads, shape.variant
    q, k, v = (
        torch.unflatten(part, -1, (count, -1)).unsqueeze(1)
        for part, count in zip(torch.split(b, list(shape.sizes), -1), (heads.q, heads.k, heads.v), strict=True)
    )
    x, A_log, dt_bias = call.x.unsqueeze(1), call["A_log"], call["dt_bias"]
    given: dict[str, Any] = {"A_log": A_log, "dt_bias": dt_bias}
    if call.case.rounds:
        x, given = call.stored(reference.forget_gate(x, A_log, dt_bias, call.arithmetic)[0]), {}
    start = call["state"][slots.clamp(min=0)]
    y, after = reference.m2rnn(q, k, v, call["state_weight"], x, start, clip=None, arithmetic=call.arithmetic, **given)
    u = _sum_with(call, y.reshape(batch, dims.total_heads * dims.head_dim), v.flatten(1), call.per_token("skip"))
    o = call.stored(_finished(call, u, call.g, call.per_token("norm"))) * there[:, None]
    conv, state = call["conv"].clone(), call["state"].clone()
    state[slots[there]] = after[there]
    if conv.shape[1]:
        conv[slots[there]] = torch.cat((conv[slots[there]][:, 1:], call.a[there, None]), 1)
    return {"o": o, "conv": conv, "state": state}


EAGER: Mapping[LayerKernel, Callable[[_Call], Results]] = {
    LayerKernel.CONVOLVE: _convolve,
    LayerKernel.CONVOLVE_BACKWARD: _convolve_backward,
    LayerKernel.DECAY: _decay,
    LayerKernel.FINISH: _finish,
    LayerKernel.FINISH_BACKWARD: _finish_backward,
    LayerKernel.DECODE: _decode,
}
WIDE = ("dconv_weight", "dconv_bias", "dA_log", "ddt_bias", "dskip", "dnorm", "state")
"""Results in float32 whatever the dtype of the operands is."""


def layer_oracle(kernel: LayerKernel, variant: Variant, case: LayerCase, operands: Operands) -> Oracle:
    """Return a kernel's results in float64, and their budgets."""
    exact = _results(kernel, variant, case, operands, (EXACT, 0))
    bits = APPROXIMATE_TANH_BITS if case.approximate else FUNCTION_BITS
    own = Arithmetic(torch.float32, LayerSizes(variant).dtype, tanh_bits=bits, gate_bits=FUNCTION_BITS)
    draws = [(replace(own, grid=2.0 ** (i / LAYER_DRAWS)), i) for i in range(LAYER_DRAWS)]
    drawn = [_results(kernel, variant, case, operands, draw) for draw in draws]
    dtypes = {name: _dtype(name, variant, case) for name in exact}
    budgets = {
        name: FACTOR * max(relative_error(found[name], exact[name]) for found in drawn)
        + torch.finfo(dtypes[name]).eps / 2
        for name in exact
    }
    return Oracle(exact, budgets, dtypes)


def _results(
    kernel: LayerKernel, variant: Variant, case: LayerCase, operands: Operands, draw: tuple[Arithmetic, int]
) -> Results:
    arithmetic, seed = draw
    wide = {name: x.to(arithmetic.state) if x.is_floating_point() else x for name, x in operands.items()}
    return EAGER[kernel](_Call(LayerSizes(variant), case, wide, arithmetic, seed))


def _dtype(name: str, variant: Variant, case: LayerCase) -> torch.dtype:
    return torch.float32 if name in WIDE or (name == "f" and not case.rounds) else LayerSizes(variant).dtype
