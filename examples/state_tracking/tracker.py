"""A model that is M2RNN layers alone: letters in, logits of their product out, and the state that it goes on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from construct import inverse_silu, state_weight, thresholds
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Start:
    """What a layer begins with."""

    weights: str
    """What its state weights are: random ``rotation``s, the ``identity``, or an ``automaton``'s, whose arrows letters
    choose among."""
    gain: float
    """Size of rotations and of the identity; of an automaton, its margin."""
    spread: float
    """Standard deviation of what letters write."""
    forget: float
    """What the forget gates are: nearly nothing."""
    heads_apart: bool
    """Whether each head is read for the place of one point; else every answer is read from all heads."""


@torch.no_grad()
def begin(layer: nn.Module, images: Tensor, points: int, start: Start) -> None:
    """Write a layer's initial values: q, k and the output gate are 1 whatever the letter, v is random.

    ``images`` are the group's; head n is read for the place of point n. ``points`` is ``Answers.points``.
    """
    degree, counts, cols = images.shape[1], layer.heads, layer.head_dim
    keys, gates = (counts.q + counts.k) * layer.state_expansion, layer.gate_heads * cols
    sizes = [keys, counts.v * cols, layer.forget_inputs, gates]
    layer.input_projection.weight.zero_().split(sizes)[1].normal_(std=start.spread)
    biases = [torch.ones(keys), torch.zeros(sizes[1] + sizes[2]), inverse_silu(torch.ones(gates))]
    layer.input_projection.bias.copy_(torch.cat(biases))
    layer.decay_gate.A_log.zero_()
    layer.decay_gate.dt_bias.fill_(math.log(math.expm1(-math.log(start.forget))))
    begin_states(layer, start)
    if layer.D is not None:
        layer.D.zero_()
    out = layer.output_projection.weight.normal_(std=cols**-0.5)
    if start.heads_apart:
        read = torch.randn(layer.total_heads, degree, cols) * cols**-0.5  # of each head: where its point is
        out = out.zero_().unflatten(1, (layer.total_heads, cols))
        for head, of_places in enumerate(read):
            if points and head < points:
                out[head * degree : (head + 1) * degree, head] = of_places
            elif not points:
                out[:, head] = of_places[images[:, head % degree]]


def begin_states(layer: nn.Module, start: Start) -> None:
    """Write the state weights that a layer begins with, and for an automaton the thresholds, as biases of v."""
    states, counts = math.isqrt(layer.head_dim), layer.heads
    used = states**2
    keys = (counts.q + counts.k) * layer.state_expansion
    biases = layer.input_projection.bias[keys : keys + counts.v * layer.head_dim].unflatten(0, (counts.v, -1))
    for head, weight in enumerate(layer.state_weight):
        nn.init.orthogonal_(weight, gain=start.gain)
        if start.weights == "identity":
            nn.init.eye_(weight).mul_(start.gain)
        if start.weights == "automaton":
            weight[:used, :used] = state_weight(head % states, states, start.gain)
            biases[head, :used] = start.gain * torch.tensor(thresholds(head % states, states))


def keep_gates(layer: nn.Module) -> None:
    """Keep q, k and both gates as they began: of the input projection, training changes what letters write alone.

    An output gate that knows the letter lets answers be right where the state is not.
    """
    keys, values = (layer.heads.q + layer.heads.k) * layer.state_expansion, layer.heads.v * layer.head_dim
    projection, gate = layer.input_projection, layer.decay_gate
    trained = torch.zeros_like(projection.bias)
    trained[keys : keys + values] = 1
    projection.weight.register_hook(lambda gradient: gradient * trained[:, None])
    projection.bias.register_hook(lambda gradient: gradient * trained)
    for parameter in (gate.A_log, gate.dt_bias):
        parameter.register_hook(torch.zeros_like)


def add_noise(layer: nn.Module, size: float) -> None:
    """Add normal numbers of this standard deviation to every gradient.

    ``keep_gates`` comes after it, and then takes them away from what it keeps.
    """
    for parameter in layer.parameters():
        parameter.register_hook(lambda gradient: gradient + size * torch.randn_like(gradient))


class Tracker(nn.Module):
    """M2RNN layers, whose hidden size is how many letters there are.

    Logits are the first ``classes`` of the last one's outputs. Each layer but the first takes the letter and what all
    before it say. Each letter is taken ``repeats`` times, and answered after the last. The state is the layers', (B,
    layers * N, 1, V) in float32. On a CPU the recurrence is ``Recurrence``, the same without what the layer's reference
    does to answer for every dtype and clip, in a small part of the time.
    """

    def __init__(self, layers: Sequence[nn.Module], classes: int, repeats: int = 1) -> None:
        super().__init__()
        if any(one.conv1d is not None or one.activation is not None or one.state_expansion != 1 for one in layers):
            raise ValueError("a tracker's layers must have state_expansion=1, conv_width=None and activation=None")
        self.layers, self.classes, self.repeats = nn.ModuleList(layers), classes, repeats

    def first(self, batch: int) -> Tensor:
        """Return the state before any letter."""
        layer = self.layers[0]
        heads = len(self.layers) * layer.total_heads
        return torch.zeros(batch, heads, 1, layer.head_dim, device=layer.state_weight.device)

    def decayed(self, inputs: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters that weight decay is for, and the others; ``inputs``: whether input projections are."""
        parts = [(one.state_weight, one.output_projection.weight, one.input_projection.weight) for one in self.layers]
        decayed = [weight for one in parts for weight in one[: 3 if inputs else 2]]
        return decayed, [p for p in self.parameters() if all(p is not one for one in decayed)]

    def one_hot(self, letters: Tensor) -> Tensor:
        """Return letters (B, T) as what layers take, (B, T, D)."""
        weight = self.layers[0].state_weight
        return F.embedding(letters, torch.eye(self.layers[0].hidden_size, dtype=weight.dtype, device=weight.device))

    def forward(self, letters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Take letters (B, T) and the state before them to logits (B, T, classes) and the state after them."""
        if self.repeats > 1:
            letters = letters.repeat_interleave(self.repeats, 1)
        said = self.one_hot(letters) if letters.is_cuda or len(self.layers) > 1 else letters
        after = list[Tensor]()
        for i, (layer, before) in enumerate(zip(self.layers, state.chunk(len(self.layers), 1), strict=True)):
            if letters.is_cuda:
                y, _, last = layer.scan(said, None, before)
            else:
                y, last = on_cpu(layer, said if i else letters, before)
            said = said + y if i + 1 < len(self.layers) else y
            after.append(last)
        return said[:, self.repeats - 1 :: self.repeats, : self.classes], torch.cat(after, 1)


def on_cpu(layer: nn.Module, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Do what a layer does without its operator, for x (B, T, D), or letters (B, T), which are projected once each."""
    heads, cols = layer.total_heads, layer.head_dim
    weight, bias = layer.input_projection.weight, layer.input_projection.bias
    of: Callable[[Tensor], Tensor]
    if x.dim() == 2:
        projected, of = weight.mT + bias, lambda table: of_letters(table, x)
    else:
        projected, of = F.linear(x, weight, bias), lambda part: part
    q, k, v, f, g = projected.split([heads, heads, heads * cols, heads, heads * cols], -1)
    v, gate = v.unflatten(-1, (heads, cols)), F.silu(g).unflatten(-1, (heads, cols))
    writes = of(k[..., None] * v).permute(1, 2, 0, 3)  # time first, then heads
    forgets = of(layer.decay_gate(f)[..., None]).permute(1, 2, 0, 3)
    states = Recurrence.apply(writes, layer.state_weight, forgets, state[:, :, 0].transpose(0, 1))
    y = states.permute(2, 0, 1, 3) * of(q[..., None] * gate)
    if layer.D is not None:
        y = y + of(layer.D * v * gate)
    return layer.output_projection(layer.g_norm(y.flatten(-2))), states[-1].transpose(0, 1)[:, :, None]


def of_letters(table: Tensor, letters: Tensor) -> Tensor:
    """Return what a table (letters, N, V) has of each of these letters (..., N, V)."""
    return F.embedding(letters, table.flatten(1)).unflatten(-1, table.shape[1:])


class Recurrence(torch.autograd.Function):
    """H_t = f_t H_(t-1) + (1 - f_t) tanh(H_(t-1) W + x_t) for x (T, N, B, V), W (N, V, V) and f (T, N, B, 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forget: Tensor, state: Tensor) -> Tensor:
        states, candidates = torch.empty_like(x), torch.empty_like(x)
        before = state
        for t in range(len(x)):
            torch.baddbmm(x[t], before, weight, out=candidates[t]).tanh_()
            before = torch.lerp(candidates[t], before, forget[t], out=states[t])
        ctx.save_for_backward(torch.cat((state[None], states[:-1])), candidates, weight, forget)
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        before, candidates, weight, forget = ctx.saved_tensors
        of_x, of_forget = torch.empty_like(before), torch.empty_like(forget)
        carried = torch.zeros_like(before[0])
        for t in reversed(range(len(before))):
            carried = carried + gradients[0][t]
            of_forget[t] = (carried * (before[t] - candidates[t])).sum(-1, keepdim=True)
            torch.mul(carried * (1 - forget[t]), 1 - candidates[t].square(), out=of_x[t])
            carried = torch.baddbmm(carried * forget[t], of_x[t], weight.mT)
        of_weight = before.transpose(0, 1).flatten(1, 2).mT @ of_x.transpose(0, 1).flatten(1, 2)
        return of_x, of_weight, of_forget, None  # the first state is data
