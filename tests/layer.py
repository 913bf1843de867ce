"""A layer that uses the operator, as a model would write it, and one step of its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Mixer(nn.Module):
    """A layer as a model would write it."""

    def __init__(self, m2rnn: Callable[..., Any]) -> None:
        super().__init__()
        self.m2rnn = m2rnn
        self.project = nn.Linear(8, 16 + 16 + 32 + 2)
        self.weight = nn.Parameter(torch.eye(16).repeat(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate = self.project(x).split([16, 16, 32, 2], -1)
        y, _ = self.m2rnn(
            q.unflatten(-1, (1, 16)), k.unflatten(-1, (1, 16)), v.unflatten(-1, (2, 16)), self.weight, gate.sigmoid()
        )
        return y.flatten(-2)


def trained(mixer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradients of a module's parameters."""
    y = mixer(x)
    names = [name for name, _ in mixer.named_parameters()]
    gradients = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


def tanh_of_both(state: Tensor, weight: Tensor, outer: Tensor) -> Tensor:
    """Return what the recurrence writes to a head's state."""
    return torch.tanh(state @ weight + outer)


def by_hand(layer: nn.Module, x: Tensor, written: Callable[..., Tensor] = tanh_of_both) -> Tensor:
    """Evaluate the published layer token by token in its parameters' dtype, from the paper's equations.

    ``written`` is what a step mixes into a head's state, of the state, the head's weight and k_t v_t^T.
    """
    p = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    rows, cols, heads = layer.state_expansion, layer.head_dim, layer.heads
    total = max(heads)
    sizes = [heads.q * rows, heads.k * rows, heads.v * cols, heads.f, layer.gate_heads * cols]
    projected = x @ p["input_projection.weight"].T + p["input_projection.bias"]
    mixed, f, g = projected.split([sum(sizes[:3]), *sizes[3:]], -1)

    def of(head: int, part: Tensor, count: int) -> Tensor:
        return part.unflatten(-1, (count, -1))[..., head // (total // count), :]

    taps = p["conv1d.weight"][:, 0]
    outputs = []
    state = x.new_zeros(total, rows, cols)
    for t in range(x.shape[0]):
        window = sum(taps[:, 3 - back] * mixed[t - back] for back in range(4) if t >= back) + p["conv1d.bias"]
        q, k, v = (window * window.sigmoid()).split(sizes[:3], -1)
        step = torch.log(1 + torch.exp(f[t] + p["decay_gate.dt_bias"]))
        gate = torch.exp(-torch.exp(p["decay_gate.A_log"]) * step)
        mixture = []
        for n in range(total):
            head = n // (total // heads.f)
            outer = torch.outer(of(n, k, heads.k), of(n, v, heads.v))
            weight = p["state_weight"][n // (total // heads.w)]
            state[n] = gate[head] * state[n] + (1 - gate[head]) * written(state[n], weight, outer)
            y = of(n, q, heads.q) @ state[n] + p["D"][n] * of(n, v, heads.v)
            out = of(n, g[t], layer.gate_heads)
            mixture.append(y * out * out.sigmoid())
        row = torch.cat(mixture)
        row = row / (row.square().mean() + 1e-5).sqrt() * p["g_norm.weight"]
        outputs.append(p["output_projection.weight"] @ row)
    return torch.stack(outputs)
