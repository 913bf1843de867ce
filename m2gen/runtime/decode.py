"""The layer on one token of each sequence, which moves a cache on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from . import fused, library
from .cache import M2RNNCache, check_holds, commit
from .convolution import convolve
from .mixer import Mixer
from .norm import RMSNorm
from .op import m2rnn_step
from .scan import bypass, epilogue, gate_of, operands_of, project

T = TypeVar("T")


def step(layer: Mixer, x: Tensor, cache: M2RNNCache, mask: Tensor | None = None) -> Tensor:
    """Advance the cache by one token of each sequence, x (B, hidden_size), or of those that mask (B,) has.

    What has none is left as it is, and its result is 0, without waiting for the device.
    """
    if fused.computes(layer, x) and fused.reads_projection(layer, x):
        indices = None if mask is None else torch.where(mask, torch.arange(mask.shape[0], device=x.device), -1)
        y = _restoring(cache, lambda: by_kernel(layer, x, cache, indices))
        return y if mask is None else y.masked_fill(~mask[:, None], 0)
    if mask is not None:
        return _masked(layer, x, cache, mask)
    y, conv = _restoring(cache, lambda: _advance(layer, x, cache, cache.state))
    cache.conv.copy_(conv)
    return y


class Pool(Protocol):
    """States of sequences, or of more of them in slots: conv (slots, conv_width - 1, C) and state (slots, N, K, V)."""

    conv: Tensor
    state: Tensor


def by_kernel(
    layer: Mixer, x: Tensor, states: Pool, indices: Tensor | None = None, out_indices: Tensor | None = None
) -> Tensor:
    """Do what ``step`` does by the layer's own kernel, where it computes what the modules would.

    Sequences are read and written where indices (B,) say, and ``out_indices`` if these are not the same: see
    ``StepParameters``.
    """
    dtype = fused.compute_dtype(x)
    check_holds(states, dtype)
    projection, module, norm = cast(nn.Linear, layer.input_projection), layer.conv1d, layer.g_norm
    A_log, dt_bias = fused.gate_parameters(layer, x.new_empty(0, layer.heads.f))
    normed = isinstance(norm, RMSNorm)
    out = library.OPERATORS.LAYER_STEP(
        x.to(dtype), projection.weight.to(dtype), None if projection.bias is None else projection.bias.to(dtype),
        None if module is None else module.weight, None if module is None else module.bias, layer.state_weight,
        A_log, dt_bias, layer.D, norm.weight if normed else None, states.conv, states.state, indices, out_indices,
        [layer.state_expansion, layer.head_dim, *layer.heads], layer.activation is not None, layer.round_gate,
        normed, norm.eps if normed else 0.0,
    )  # fmt: skip
    y: Tensor = layer.output_projection(out)
    return y


def _restoring(cache: M2RNNCache, call: Callable[[], T]) -> T:
    """Return what a call returns that writes a cache in place, and which leaves it as it was if it fails.

    What is captured or compiled does not fail half way when it is run.
    """
    if torch.compiler.is_compiling() or (cache.state.is_cuda and torch.cuda.is_current_stream_capturing()):
        return call()
    before = cache.conv.clone(), cache.state.clone()
    try:
        return call()
    except BaseException:
        cache.conv.copy_(before[0])
        cache.state.copy_(before[1])
        raise


def _masked(layer: Mixer, x: Tensor, cache: M2RNNCache, mask: Tensor) -> Tensor:
    """Do the same by modules, which compute all sequences, and drop what has no token."""
    state = cache.state.clone()
    y, conv = _advance(layer, x, cache, state)
    conv = torch.where(mask[:, None, None], conv, cache.conv)
    commit(cache, conv, torch.where(mask[:, None, None, None], state, cache.state))
    return y.masked_fill(~mask[:, None], 0)


def _advance(layer: Mixer, x: Tensor, cache: M2RNNCache, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advance ``state`` by x (B, hidden_size) in place; return what comes of it, and the convolution's last inputs."""
    mixed, f, g = project(layer, x)
    check_holds(cache, mixed.dtype)
    mixed, conv = convolve(layer.conv1d, mixed[:, None], layer.conv_width, cache.conv)
    q, k, v = operands_of(layer, mixed[:, 0])
    f, A_log, dt_bias = gate_of(layer, f, q.dtype)
    y, _ = m2rnn_step(q, k, v, layer.state_weight, f, state, A_log=A_log, dt_bias=dt_bias)
    return epilogue(layer, bypass(layer, y, v), g), conv
