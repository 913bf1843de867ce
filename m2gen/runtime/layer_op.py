"""What a layer computes between its projections, forwards and backwards, by kernels: the layer's operators."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, launches, layer_states
from . import layer_launches as around
from .buffers import Operands
from .known import KnownCall
from .layer_launches import Convolution, Epilogue, LayerKernels

_CALLS: dict[Hashable, KnownCall] = {}
"""Calls by what launches depend on; saves half of the time that a call takes of the host."""
_MOST_CALLS = 4096


class Parameters(NamedTuple):
    """Tensors of a layer that the operators take, in their order; None where a layer has none."""

    projected: Tensor
    """Rows of the input projection, (B, S, P) or (T, P)."""
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    state_weight: Tensor
    A_log: Tensor
    dt_bias: Tensor
    skip: Tensor | None
    """D of the layer, (N, V)."""
    norm_weight: Tensor | None
    conv: Tensor | None
    """Inputs of the convolution before each sequence, (B, width - 1, channels)."""
    state: Tensor | None
    """The recurrence's state before each sequence, (B, N, K, V)."""


class Settings(NamedTuple):
    """Numbers of a layer that the operators take, in their order."""

    dims: Sequence[int]
    """K and V, then the heads of q, k, v, f and w."""
    columns: Sequence[int]
    """First columns of the gate's inputs and of the output gates in a row of the projection."""
    silu: bool
    rounds: bool
    """Whether the gate is rounded to the projection's dtype."""
    computes_gate: bool
    """Whether the recurrence computes the gate from its input."""
    norm: bool
    eps: float
    bound: float


class _Rows(NamedTuple):
    """Columns of the projection's rows, (T, ...): of the convolution, the gate's inputs and the output gates."""

    a: Tensor
    x: Tensor
    g: Tensor


def call_like(tensors: Iterable[Tensor | None], rest: tuple[object, ...]) -> KnownCall:
    """Return what is known of calls of a content that agree in the rest, and in what tensors are and how they lie."""
    facts = (None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15) for x in tensors)
    key = (dispatch.SPACE.name, *facts, *rest)  # other kernels serve another content, which a reload may bring
    call = _CALLS.get(key)
    if call is None:
        if len(_CALLS) >= _MOST_CALLS:
            _CALLS.clear()
        call = _CALLS[key] = KnownCall()
    return call


def forget_calls() -> None:
    """Forget what is known of calls, so that kernels are chosen again."""
    _CALLS.clear()


def _rows(flat: Tensor, kernels: LayerKernels, settings: Settings) -> _Rows:
    plan, (x, g) = kernels.plan, settings.columns
    return _Rows(flat[:, : plan.channels], flat[:, x : x + settings.dims[5]], flat[:, g : g + plan.inner])


def _operands(p: Parameters, qkv: Tensor, rows: _Rows, kernels: LayerKernels, settings: Settings) -> Operands:
    """Return what the recurrence takes, with the lead dims of the projection."""
    plan, dims, lead = kernels.plan, settings.dims, p.projected.shape[:-1]
    q, k, v = (
        torch.unflatten(torch.unflatten(part, -1, (count, -1)), 0, lead)
        for part, count in zip(qkv.tensor_split((plan.q_end, plan.k_end), -1), dims[2:5], strict=True)
    )
    if settings.computes_gate:
        return q, k, v, p.state_weight, torch.unflatten(rows.x, 0, lead), p.A_log, p.dt_bias
    dtype = q.dtype if settings.rounds else torch.float32
    f = torch.unflatten(around.decay(kernels, rows.x, p.A_log, p.dt_bias, dtype), 0, lead)
    return q, k, v, p.state_weight, f, None, None


def forward(
    p: Parameters, cu_seqlens: Tensor | None, host: Tensor | None, settings: Settings, save: bool, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output projection's input (..., N V), the final state, y, and checkpoints (none unless ``save``)."""
    call = call_like((*p, cu_seqlens), ("forward", settings, save, deterministic))
    kernels = LayerKernels(dispatch.layer_kernels(settings.dims, p.projected), call.launches)
    flat = p.projected.flatten(0, -2)
    rows, tokens = _rows(flat, kernels, settings), around.tokens_of(p.projected, cu_seqlens)
    qkv = around.convolve(kernels, rows.a, _convolution(p, settings), p.conv, tokens)
    operands = _operands(p, qkv, rows, kernels, settings)
    y, state, checkpoints = launches.forward(operands, p.state, cu_seqlens, save, deterministic, call, host)
    v = qkv[:, kernels.plan.k_end :]
    out = around.finish(kernels, y.flatten(0, -3).flatten(1), v, rows.g, _epilogue(p, settings))
    if checkpoints is None:
        checkpoints = state.new_empty(0, *state.shape[1:])
    return torch.unflatten(out, 0, p.projected.shape[:-1]), state, y, checkpoints


def backward(
    dout: Tensor,
    dstate: Tensor | None,
    p: Parameters,
    y: Tensor,
    checkpoints: Tensor,
    cu_seqlens: Tensor | None,
    settings: Settings,
    wanted: Sequence[bool],
    deterministic: bool,
) -> list[Tensor]:
    """Return the ``wanted`` gradients of ``Parameters``, which computes the convolution again."""
    call = call_like(
        (dout, dstate, *p, y, checkpoints, cu_seqlens), ("backward", settings, tuple(wanted), deterministic)
    )
    kernels = LayerKernels(dispatch.layer_kernels(settings.dims, p.projected), call.launches)
    plan, lead = kernels.plan, p.projected.shape[:-1]
    flat = p.projected.flatten(0, -2)
    dflat = flat.new_empty(flat.shape)
    rows, drows = _rows(flat, kernels, settings), _rows(dflat, kernels, settings)
    if dflat.shape[1] > plan.channels + plan.inner + settings.dims[5]:
        dflat[:, plan.channels + plan.inner + settings.dims[5] :].zero_()  # columns that only fill a row
    tokens, conv = around.tokens_of(p.projected, cu_seqlens), _convolution(p, settings)
    qkv = around.convolve(kernels, rows.a, conv, p.conv, tokens)
    operands = _operands(p, qkv, rows, kernels, settings)
    finished = around.finish_backward(
        kernels, dout.flatten(0, -2), y.flatten(0, -3).flatten(1), qkv[:, plan.k_end :], rows.g,
        _epilogue(p, settings), drows.g,
    )  # fmt: skip
    gate = settings.computes_gate
    asked = [True, True, True, wanted[3], True, gate, gate, wanted[9]]
    found = iter(
        launches.backward(
            finished.du.view(y.shape),
            dstate,
            operands,
            checkpoints,
            cu_seqlens,
            settings.bound,
            asked,
            deterministic,
            call,
        )
    )
    dq, dk, dv = (next(found).flatten(0, -3).flatten(1) for _ in range(3))
    dweight = next(found) if wanted[3] else None
    df = next(found).flatten(0, -2)
    if gate:
        drows.x.copy_(df)
        dA_log, ddt_bias = next(found), next(found)
    else:
        dA_log, ddt_bias = around.decay_backward(kernels, rows.x, p.A_log, p.dt_bias, df, drows.x)
    bypass = (None, None) if p.skip is None else (finished.du, p.skip)
    dconv = around.convolve_backward(kernels, rows.a, drows.a, conv, p.conv, tokens, (dq, dk, dv), bypass)
    every = (
        torch.unflatten(dflat, 0, lead), _as(dconv.weight, p.conv_weight), _as(dconv.bias, p.conv_bias), dweight,
        dA_log, ddt_bias, _as(finished.skip, p.skip), _as(finished.weight, p.norm_weight),
        _dconv(p, rows.a, conv, cu_seqlens, (dq, dk, dv), finished.du) if wanted[8] else None, next(found, None),
    )  # fmt: skip
    return [x for x, want in zip(every, wanted, strict=True) if want and x is not None]


def _dconv(
    p: Parameters,
    a: Tensor,
    conv: Convolution,
    cu_seqlens: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    du: Tensor,
) -> Tensor | None:
    """Return the gradient of the inputs before each sequence."""
    if p.conv is None:
        return None
    bypass = torch.zeros_like(du) if p.skip is None else du * p.skip.flatten().to(torch.float32)
    at = layer_states.offsets_of(p.projected, cu_seqlens)
    return layer_states.gradient_of_first(a, p.conv, conv, at, gradients, bypass)


def _convolution(p: Parameters, settings: Settings) -> Convolution:
    return Convolution(p.conv_weight, p.conv_bias, settings.silu)


def _epilogue(p: Parameters, settings: Settings) -> Epilogue:
    return Epilogue(p.skip, p.norm_weight, settings.norm, settings.eps)


def _as(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    if gradient is None or parameter is None:
        return None
    return gradient.reshape(parameter.shape).to(parameter.dtype)
