"""The layer on one token of each sequence, which moves a cache on."""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import M2RNNCache, check_holds, commit
from .convolution import convolve
from .mixer import Mixer
from .op import m2rnn_step
from .scan import bypass, epilogue, gate_of, operands_of, project


def step(layer: Mixer, x: Tensor, cache: M2RNNCache) -> Tensor:
    """Advance the cache by one token of each sequence, x (B, hidden_size)."""
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        y, conv = _advance(layer, x, cache, cache.state)  # what is replayed does not fail half way
    else:
        before = cache.state.clone()
        try:
            y, conv = _advance(layer, x, cache, cache.state)
        except BaseException:
            cache.state.copy_(before)
            raise
    cache.conv.copy_(conv)
    return y


def masked_step(layer: Mixer, x: Tensor, cache: M2RNNCache, mask: Tensor) -> Tensor:
    """Advance the cache by one token of those sequences, x (B, 1, hidden_size), that have one: mask (B, 1).

    The others are computed, too, and dropped: to leave them out would wait for the device.
    """
    state = cache.state.clone()
    y, conv = _advance(layer, x[:, 0], cache, state)
    conv = torch.where(mask[..., None], conv, cache.conv)
    commit(cache, conv, torch.where(mask[..., None, None], state, cache.state))
    return y[:, None].masked_fill(~mask[..., None], 0)


def _advance(layer: Mixer, x: Tensor, cache: M2RNNCache, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advance ``state`` by x (B, hidden_size) in place; return what comes of it, and the convolution's last inputs."""
    mixed, f, g = project(layer, x)
    check_holds(cache, mixed)
    mixed, conv = convolve(layer.conv1d, mixed[:, None], layer.conv_width, cache.conv)
    q, k, v = operands_of(layer, mixed[:, 0])
    f, A_log, dt_bias = gate_of(layer, f, q.dtype)
    y, _ = m2rnn_step(q, k, v, layer.state_weight, f, state, A_log=A_log, dt_bias=dt_bias)
    return epilogue(layer, bypass(layer, y, v), g), conv
