"""The layer's operators as torch knows them: schemas, kernels, gradients, fake results, counts of flops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import fakes, launches, layer_decode, layer_op, transforms
from .layer_op import Parameters, Settings
from .transforms import Rules

COUNT, NUMBERS = len(Parameters._fields), len(Settings._fields)
AFTER = COUNT + 2
"""The forward's first setting, counted from 0: after the parameters, and offsets on the device and on the host."""
SAVE = AFTER + NUMBERS
"""The forward's argument that asks for checkpoints."""
_PARAMETERS = (
    "Tensor projected, Tensor? conv_weight, Tensor? conv_bias, Tensor state_weight, Tensor A_log, Tensor dt_bias,"
    " Tensor? skip, Tensor? norm_weight, Tensor? conv, Tensor? state"
)
_SETTINGS = "int[] dims, int[] columns, bool silu, bool rounds, bool computes_gate, bool norm, float eps, float bound"
SCHEMAS = {
    "layer": f"({_PARAMETERS}, Tensor? cu_seqlens, Tensor? cu_seqlens_cpu, {_SETTINGS}, bool save,"
    " bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)",
    "layer_backward": f"(Tensor dout, Tensor? dstate, {_PARAMETERS}, Tensor y, Tensor checkpoints,"
    f" Tensor? cu_seqlens, {_SETTINGS}, bool[] wanted, bool deterministic) -> Tensor[]",
    "layer_step": layer_decode.SCHEMA,
}


def rules(forward: Any, backward: Any, step: Any) -> dict[str, Rules]:
    """Return the rules of the operators, given as torch has them, by name."""

    def gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradient(backward, ctx, *gradients)

    def refused(ctx: Any, *_: Any) -> tuple[None, ...]:
        raise RuntimeError("M2RNN: gradients cannot be differentiated again; no second derivative is built")

    return {
        "layer": Rules(
            _forward, transforms.differentiable(forward, _setup, gradient, saves=SAVE),
            transforms.one_by_one(forward), _fake_forward, _forward_flops,
        ),
        "layer_backward": Rules(
            _backward, transforms.differentiable(backward, lambda *_: None, refused),
            transforms.one_by_one(backward), _fake_backward, _backward_flops,
        ),
        "layer_step": layer_decode.rules(step),
    }  # fmt: skip


def _settings(numbers: Sequence[Any]) -> Settings:
    """Return settings that can be a key."""
    settings = Settings(*numbers)
    return settings._replace(dims=tuple(settings.dims), columns=tuple(settings.columns))


def _dense(p: Parameters) -> Parameters:
    """Return tensors whose strides kernels take for granted; compilers and transforms may have changed them.

    Rows of the projection may be apart, as compilers have them.
    """
    projected = p.projected if p.projected.stride(-1) == 1 else p.projected.contiguous()
    return Parameters(projected, *(x if x is None else x.contiguous() for x in p[1:]))  # type: ignore[arg-type]


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    cu_seqlens, host = arguments[COUNT:AFTER]
    settings = _settings(arguments[AFTER:SAVE])
    offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
    call = (_dense(Parameters(*arguments[:COUNT])), offsets, host, settings, *arguments[SAVE:])
    results: tuple[Tensor, ...] = launches.on_device(layer_op.forward, arguments[0].get_device(), call)
    return results


def _backward(dout: Tensor, dstate: Tensor | None, *arguments: Any) -> list[Tensor]:
    y, checkpoints, cu_seqlens = arguments[COUNT : COUNT + 3]
    settings, (wanted, deterministic) = _settings(arguments[COUNT + 3 : -2]), arguments[-2:]
    call = (
        dout.contiguous(), dstate if dstate is None else dstate.contiguous(), _dense(Parameters(*arguments[:COUNT])),
        y.contiguous(), checkpoints.contiguous(), cu_seqlens, settings, wanted, deterministic,
    )  # fmt: skip
    gradients: list[Tensor] = launches.on_device(layer_op.backward, dout.get_device(), call)
    return gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.settings, ctx.deterministic, ctx.shape = inputs[AFTER:SAVE], inputs[-1], output[0].shape
    ctx.save_for_backward(*inputs[:COUNT], output[2], output[3], inputs[COUNT])
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)


def _gradient(
    backward: Any, ctx: Any, dout: Tensor | None, dstate: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: a recomputed forward may be unpacked no more often
    wanted = list(ctx.needs_input_grad[:COUNT])
    if dout is None:
        dout = saved[0].new_zeros(()).expand(ctx.shape)
    found = iter(backward(dout, dstate, *saved, *ctx.settings, wanted, ctx.deterministic))
    return (*(next(found) if want else None for want in wanted), *(None,) * (SAVE + 2 - COUNT))


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    p, settings = Parameters(*arguments[:COUNT]), Settings(*arguments[AFTER:SAVE])
    projected, (rows, cols, *heads) = p.projected, settings.dims
    lead, gate = projected.shape[:-1], settings.computes_gate
    q, k, v = (projected.new_empty(*lead, n, size) for n, size in zip(heads[:3], (rows, rows, cols), strict=True))
    wide = projected.dtype if gate or settings.rounds else torch.float32
    y, state, checkpoints = fakes.forward(
        q, k, v, p.state_weight, projected.new_empty(*lead, heads[3], dtype=wide), p.A_log if gate else None,
        p.dt_bias if gate else None, p.state, arguments[COUNT], None, settings.bound, *arguments[SAVE:],
    )  # fmt: skip
    return y.new_empty(*lead, y.shape[-2] * y.shape[-1]), state, y, checkpoints


def _fake_backward(dout: Tensor, dstate: Tensor | None, *arguments: Any) -> list[Tensor]:
    wanted = arguments[-2]
    tensors = zip(arguments[:COUNT], wanted, strict=True)
    return [x.new_empty(x.shape) for x, want in tensors if want and x is not None]


def _forward_flops(projected: Tensor, *arguments: Any, **_: Any) -> int:
    """Count H W, k v^T and H^T q of every step and head."""
    return _products(projected, arguments[AFTER - 1], 2)


def _backward_flops(dout: Tensor, dstate: Tensor | None, projected: Tensor, *arguments: Any, **_: Any) -> int:
    """Count H W and k v^T again, and the products of every gradient."""
    dims = arguments[COUNT + 2]
    return _products(projected, dims, 6 + dims[1])  # also D W^T, and H^T D for the weight


def _products(projected: Tensor, dims: Sequence[int], terms: int) -> int:
    rows, cols, *heads = dims
    return 2 * math.prod(projected.shape[:-1]) * max(heads) * rows * cols * (cols + terms)
