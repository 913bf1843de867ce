"""Several models of one shape as one: each parameter has a first dim of models, and their heads are one operator's.

A step of one small model leaves a GPU idle; a step of many at once takes little longer. Nothing is shared between the
models, which may differ in everything that is a number: seeds, initial values, learning rate, weight decay, clip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from decoder import Decoder
from torch import Tensor
from torch.nn import functional as F

Operator = Callable[..., tuple[Tensor, Tensor]]
"""A package's ``m2rnn``."""


class Stack:
    """``Decoder``s of M2RNN layers without a convolution, all of one shape; ``flat`` (models, numbers) has all of them.

    ``parameters`` are views of it, by the decoders' names, and what gradients are of.
    """

    def __init__(self, models: Sequence[Decoder], operator: Operator, backend: str, device: torch.device) -> None:
        self.blocks = [block.mixer for block in models[0].blocks]
        if any(mixer.conv1d is not None for mixer in self.blocks):
            raise ValueError("layers of a stack must have conv_width=None")
        self.operator, self.backend, self.models = operator, backend, len(models)
        states = [dict(model.named_parameters()) for model in models]
        shapes = {name: value.shape for name, value in states[0].items()}
        rows = [torch.cat([state[name].detach().flatten() for name in shapes]) for state in states]
        self.flat = torch.stack(rows).to(device)
        parts = self.flat.split([shape.numel() for shape in shapes.values()], 1)
        self.parameters: dict[str, Tensor] = {
            name: part.unflatten(1, shape).detach().requires_grad_()
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def state_of(self, model: int) -> Mapping[str, Tensor]:
        """Return one model's parameters, as ``Decoder.load_state_dict`` takes them."""
        return {name: value[model].detach().clone() for name, value in self.parameters.items()}

    def __call__(self, letters: Tensor) -> Tensor:
        """Letters (models, B, S) to logits (models, B, S, classes)."""
        table = self.parameters["embed.weight"]
        first = torch.arange(self.models, device=letters.device)[:, None, None] * table.shape[1]
        x = F.embedding(letters + first, table.flatten(0, 1))
        for i in range(len(self.blocks)):
            x = x + self._mixer(i, self._normed(f"blocks.{i}.before_mixer", x))
            hidden = F.gelu(self._linear(f"blocks.{i}.up", self._normed(f"blocks.{i}.before_mlp", x)))
            x = x + self._linear(f"blocks.{i}.down", hidden)
        return self._linear("head", self._normed("norm", x))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight = self.parameters[f"{name}.weight"]
        y = torch.bmm(x.flatten(1, 2), weight.mT).unflatten(1, x.shape[1:3])
        bias = self.parameters.get(f"{name}.bias")
        return y if bias is None else y + bias[:, None, None]

    def _normed(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:]) * self.parameters[f"{name}.weight"][:, None, None]

    def _mixer(self, i: int, x: Tensor) -> Tensor:
        """Do what the layer does, all models' heads side by side in one call of the operator."""
        own = {name.split(".mixer.")[1]: p for name, p in self.parameters.items() if f"blocks.{i}.mixer." in name}
        layer, heads = self.blocks[i], self.blocks[i].heads
        sizes = [heads.q * layer.state_expansion, heads.k * layer.state_expansion, heads.v * layer.head_dim]
        projected = self._linear(f"blocks.{i}.mixer.input_projection", x)
        mixed, f, g = projected.split([sum(sizes), heads.f, layer.total_heads * layer.head_dim], -1)
        if layer.activation == "silu":
            mixed = F.silu(mixed)
        q, k, v = (part.unflatten(-1, (layer.total_heads, -1)) for part in mixed.split(sizes, -1))
        side = [part.permute(1, 2, 0, *range(3, part.dim())).flatten(2, 3) for part in (q, k, v, f)]
        y, _ = self.operator(
            *side[:3], own["state_weight"].flatten(0, 1), side[3], clip=layer.clip, backend=self.backend,
            A_log=own["decay_gate.A_log"].flatten(), dt_bias=own["decay_gate.dt_bias"].flatten(),
        )  # fmt: skip
        y = y.unflatten(2, (self.models, -1)).permute(2, 0, 1, 3, 4)
        if layer.D is not None:
            y = y + own["D"][:, None, None] * v
        y = (y * F.silu(g.unflatten(-1, (layer.total_heads, -1)))).flatten(-2)
        if "g_norm.weight" in own:
            y = F.rms_norm(y, y.shape[-1:], eps=layer.g_norm.eps) * own["g_norm.weight"][:, None, None]
        return self._linear(f"blocks.{i}.mixer.output_projection", y)
