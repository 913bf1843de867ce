"""Layers and one step of their training: one as a model would write it around the operator, and the packages' own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from calls import distance
from support import SCHEDULES, build_package, import_package, make_variant
from torch import Tensor, nn

HIDDEN = 24
GROUPED = (2, 1, 4, 2, 4)
PLAIN = {"state_expansion": 16, "head_dim": 16, "heads": {"q": 1, "k": 1, "v": 2, "f": 2, "w": 2}}
GATED = {"state_expansion": 9, "head_dim": 9, "heads": {**dict(zip("qkvfw", GROUPED, strict=True)), "g": 2}}
SHAPES = {"given": PLAIN, "softplus": GATED}
"""Shapes of layers whose variant is given the gate, and whose variant computes it."""


def layered(folder: Path) -> ModuleType:
    """Return a package with a gate given in one variant and computed in the other, in fp32 and bf16."""
    dtypes = ("fp32", "bf16")
    given = [make_variant(dtype=dtype) for dtype in dtypes]
    gated = [make_variant(9, 9, GROUPED, dtype, gate="softplus") for dtype in dtypes]
    built = build_package("layered", [*given, *gated], SCHEDULES["two_level_partial"])
    return import_package(folder / "layered", built, f"m2gen_test_{folder.name}_layered")


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
    """Return the values that the recurrence writes to a head's state."""
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


def make_layer(package: ModuleType, shape: str = "given", **options: Any) -> nn.Module:
    """Return a layer whose parameters are all drawn, so that none hides in a one or a zero."""
    torch.manual_seed(0)
    layer = package.M2RNN(HIDDEN, **{**SHAPES[shape], "bias": True, **options})
    with torch.no_grad():
        for parameter in (layer.D, layer.g_norm.weight, layer.state_weight, layer.input_projection.bias):
            parameter.add_(0.3 * torch.randn_like(parameter))
        layer.decay_gate.A_log.sub_(2)
        layer.decay_gate.dt_bias.add_(2)
    return layer


def tokens(device: torch.device, *lead: int, seed: int = 1) -> Tensor:
    """Return inputs of a layer."""
    return torch.randn(*lead, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(device)


def loss_weights(y: Tensor) -> Tensor:
    """Return the gradient of a fixed, uneven loss by y."""
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y).cos()


def with_gradients(layer: nn.Module, x: Tensor, **call: Any) -> dict[str, Tensor]:
    """Return the output and the gradients of the input and of every parameter for a fixed, uneven loss."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf, **call)
    names = [name for name, _ in layer.named_parameters()]
    gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], loss_weights(y))
    return {"y": y.detach(), **dict(zip(["x", *names], gradients, strict=True))}


def twin(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the same layer on the reference backend."""
    other = copy.deepcopy(layer)
    other.backend = "reference"
    return other.to(dtype)


def _shuffled(layer: nn.Module, order: Tensor) -> nn.Module:
    """Return the layer for inputs whose channels are in another order: the same function, rounded differently.

    The order hardly moves a gate near 1, and the one rounding of it is what 1 - f is known to: dt_bias moves by one of
    its last place, or not, so that gates are rounded differently, too.
    """
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.input_projection.weight.copy_(layer.input_projection.weight[:, order])
        dt_bias = other.decay_gate.dt_bias
        signs = order[: dt_bias.numel()].remainder(3).sub(1).to(dt_bias.dtype)
        dt_bias.mul_(1 + signs * torch.finfo(torch.float32).eps)
    return other


def budgets(exact: dict[str, Tensor], plain: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Return twice the largest error that the eager layer makes in the layer's own dtype, plus one rounding."""
    worst = dict.fromkeys(exact, 0.0)
    for seed in range(6):
        order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(seed)).to(x.device)
        back = order.argsort()
        results = with_gradients(_shuffled(plain, order), x.to(dtype)[..., order])
        results["x"] = results["x"][..., back]
        results["input_projection.weight"] = results["input_projection.weight"][:, back]
        worst = {name: max(worst[name], distance(results[name], exact[name])) for name in exact}
    return {name: 2 * error + torch.finfo(dtype).eps / 2 for name, error in worst.items()}


def assert_within(given: dict[str, Tensor], exact: dict[str, Tensor], allowed: dict[str, float]) -> None:
    """Fail unless every tensor's relative error is at most what it is allowed."""
    assert given.keys() == exact.keys()
    errors = {name: distance(given[name], exact[name]) for name in exact}
    assert {name: (error, allowed[name]) for name, error in errors.items() if not error <= allowed[name]} == {}


def in_pieces(layer: nn.Module, x: Tensor, cache: Any, *, rounds: bool = False) -> Tensor:
    """Return what a layer makes of x (B, S, hidden_size) by a prefill of 2 tokens, one of 3, and steps of decoding.

    With ``rounds`` the state is rounded to bfloat16 after each call, whatever dtype it is kept in.
    """
    pieces = []
    with torch.no_grad():
        for start, end in pairwise((0, 2, *range(5, x.shape[1] + 1))):
            pieces.append(layer(x[:, start:end], cache))
            if rounds:
                cache.state.copy_(cache.state.bfloat16())
    return torch.cat(pieces, 1)
