"""The layer on whole sequences, from states to states, around the operator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import built, fused
from .activations import activate
from .cache import States, check_states
from .convolution import convolve, convolve_packed
from .mixer import Mixer, operand_sizes
from .op import m2rnn


def scan(
    layer: Mixer,
    x: Tensor,
    conv: Tensor | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what ``M2RNN.scan`` does once the layer's hooks have run, of any module with its attributes."""
    check_states(layer, x, conv, state, cu_seqlens)
    if fused.serves(layer, x):
        return fused.scan(layer, x, conv, state, cu_seqlens, cu_seqlens_cpu)
    mixed, f, g = project(layer, x)
    y, conv, state = recur(layer, mixed, f, States(conv, state), cu_seqlens, cu_seqlens_cpu)
    return epilogue(layer, y, g), conv, state


def project(layer: Mixer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is convolved, the forget gate's input and the output gate's; columns beyond them fill up rows."""
    return fused.project(layer, x).parts(layer)


def recur(
    layer: Mixer,
    mixed: Tensor,
    f: Tensor,
    before: States,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve, run the operator and add D v; return that and the states after it."""
    if cu_seqlens is None:
        mixed, inputs = convolve(layer.conv1d, mixed, layer.conv_width, before.conv)
        conv = inputs.clone()  # a view would keep every input for as long as the states
    else:
        mixed, conv = convolve_packed(layer.conv1d, mixed, layer.conv_width, cu_seqlens, before.conv)
    q, k, v = operands_of(layer, mixed)
    f, A_log, dt_bias = gate_of(layer, f, q.dtype)
    y, state = m2rnn(
        q, k, v, layer.state_weight, f, before.state, cu_seqlens, layer.clip,
        A_log=A_log, dt_bias=dt_bias, cu_seqlens_cpu=cu_seqlens_cpu, backend=layer.backend,
    )  # fmt: skip
    return bypass(layer, y, v), conv, state


def operands_of(layer: Mixer, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of what the convolution gave."""
    parts = torch.split(activate(layer.activation, mixed), list(operand_sizes(layer)), -1)
    q, k, v = (torch.unflatten(part, -1, (count, -1)) for part, count in zip(parts, layer.heads, strict=False))
    return q, k, v


def gate_of(layer: Mixer, f: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return what ``m2rnn`` takes as forget, and A_log and dt_bias where the kernels compute the gate."""
    if layer.forget_inputs != layer.heads.f:
        f = f.repeat_interleave(layer.heads.f // layer.forget_inputs, -1)
    if layer.round_gate:
        return layer.decay_gate(f).to(dtype), None, None
    heads = tuple(layer.heads)  # torch.compile of torch 2.11 finds no key that holds a NamedTuple
    key = (layer.state_expansion, layer.head_dim, heads, dtype, True)
    if layer.backend != "reference" and key not in built.VARIANTS:
        return layer.decay_gate(f), None, None
    f, A_log, dt_bias = layer.decay_gate(f, True)
    return f, A_log, dt_bias


def bypass(layer: Mixer, y: Tensor, v: Tensor) -> Tensor:
    """Return y + D v."""
    if layer.D is None:
        return y
    return y + layer.D.to(y.dtype) * v.repeat_interleave(layer.total_heads // layer.heads.v, -2)


def epilogue(layer: Mixer, y: Tensor, g: Tensor) -> Tensor:
    """Return the layer's result of y + D v (..., N, V) and of the output gate's input."""
    g = torch.unflatten(g, -1, (layer.gate_heads, layer.head_dim))
    g = g.repeat_interleave(layer.total_heads // layer.gate_heads, -2)
    mixed: Tensor = layer.output_projection(layer.g_norm((y * F.silu(g)).flatten(-2)))
    return mixed
