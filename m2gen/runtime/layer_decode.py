"""The layer on one token of each sequence: an aligned projection, and one kernel up to the output projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from . import dispatch, launches, layer_op, transforms
from .layer_launches import LayerKernels
from .layer_step import StepParameters, StepSettings, advance
from .memory import check_written
from .room import widened
from .transforms import Rules

COUNT = len(StepParameters._fields)
WRITTEN, AFTER = StepParameters._fields.index("conv"), StepParameters._fields.index("indices")
"""Arguments that are written begin and end here."""
SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? conv_weight, Tensor? conv_bias, Tensor state_weight, Tensor A_log,"
    " Tensor dt_bias, Tensor? skip, Tensor? norm_weight, Tensor(a!) conv, Tensor(b!) state, Tensor? indices,"
    " Tensor? out_indices, int[] dims, bool silu, bool rounds, bool norm, float eps) -> Tensor"
)


def decode(p: StepParameters, settings: StepSettings) -> Tensor:
    """Advance the states by a token of each sequence in place; return the output projection's input, (B, N V)."""
    settings = settings._replace(dims=tuple(settings.dims))
    rows = projected(p.x, p.weight, p.bias)
    call = layer_op.call_like((rows, *p[3:]), ("decode", settings))
    addresses = (p.conv.data_ptr(), p.state.data_ptr())
    if not p.state.is_meta and (call.places is None or call.places.meet(addresses)):
        call.places = check_written("M2RNN", "cache.state", p.state, {"cache.conv": p.conv}, call.places)
    kernels = LayerKernels(dispatch.layer_kernels(settings.dims, rows), call.launches)
    return advance(kernels, rows, p[3:], settings, dispatch.approximates(rows.device))


def projected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weight^T + bias (B, P), in rows of a multiple of ``ROW`` columns where parameters have the room."""
    wide, wide_bias = widened(weight), None if bias is None else widened(bias)
    if wide is None or (bias is not None and wide_bias is None):
        return F.linear(x, weight, bias)
    return F.linear(x, wide, wide_bias)[:, : weight.shape[0]]


def kernel(*arguments: Any) -> Tensor:
    """Do what the operator does with tensors of any strides, as compilers and transforms leave them."""
    p, settings = StepParameters(*arguments[:COUNT]), StepSettings(*arguments[COUNT:])
    kept = (p.x, p.conv, p.state)
    tensors: list[Any] = [x if x is None or any(x is y for y in kept) else x.contiguous() for x in p]
    dense = StepParameters(*tensors)
    out: Tensor = launches.on_device(decode, p.x.get_device(), (dense, settings))
    return out


def rules(operator: transforms.Operator) -> Rules:
    """Return the operator's rules, which has no gradients."""

    def autograd(*arguments: Any) -> Any:
        transforms.refuse_tangents("M2RNN", arguments)
        if transforms.wants_gradient(arguments):
            raise RuntimeError("M2RNN: a cache has no gradients; call under torch.no_grad(), or use scan")
        with transforms.below():
            return operator(*arguments)

    def mapped(info: transforms.MapInfo, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        if None in in_dims[WRITTEN:AFTER]:
            raise RuntimeError("M2RNN: both states must be mapped by vmap where another operand is: they are written")
        return transforms.one_by_one(operator)(info, in_dims, *arguments)

    return Rules(kernel, autograd, mapped, _fake, _flops)


def _fake(*arguments: Any) -> Tensor:
    p, settings = StepParameters(*arguments[:COUNT]), StepSettings(*arguments[COUNT:])
    return p.x.new_empty(p.x.shape[0], settings.dims[4] * settings.dims[1])


def _flops(x: Tensor, weight: Tensor, *arguments: Any, **_: Any) -> int:
    """Count the projection's product, and H W, k v^T and H^T q of every head."""
    rows, cols, *heads = arguments[COUNT - 2]
    total: int = 2 * x.shape[0] * (weight.numel() + max(heads) * rows * cols * (cols + 2))
    return total
