"""A hybrid model of M2RNN layers and attention, as FSDP shards it: blocks of a mixer and an MLP, without embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2gen.bench.layers.makers import Attention
from m2gen.bench.ranks.entries import WIDER
from m2gen.bench.ranks.kinds import Mixing

HIDDEN_DIMS = {
    "input_projection.weight": 1,
    "output_projection.weight": 0,
    "qkv.weight": 1,
    "out.weight": 0,
    "up.weight": 1,
    "down.weight": 0,
    "first.weight": 0,
    "second.weight": 0,
}
"""The dim of each parameter that is the model's width, by the ends of their names."""


class Block(nn.Module):
    """x plus a mixer of its norm, and then plus an MLP of the norm of that."""

    def __init__(self, mixer: nn.Module, hidden: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        made: Any = {"device": device, "dtype": dtype}
        self.first, self.second = (nn.RMSNorm(hidden, eps=1e-5, **made) for _ in range(2))
        self.mixer = mixer
        self.up = nn.Linear(hidden, WIDER * hidden, bias=False, **made)
        self.down = nn.Linear(WIDER * hidden, hidden, bias=False, **made)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of x (B, S, hidden), and their columns."""
        x = x + self.mixer(self.first(x))
        y: Tensor = x + self.down(F.gelu(self.up(self.second(x))))
        return y


class Hybrid(nn.Module):
    """Blocks one after the other."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Take x (B, S, hidden) to the same shape."""
        for block in self.blocks:
            x = block(x)
        return x


def hybrid(
    mixings: Sequence[Mixing], layer: Callable[[], nn.Module], hidden: int, device: torch.device, dtype: torch.dtype
) -> Hybrid:
    """Return a model with a ``layer`` in every block that has one, and causal attention in the others."""
    mixers = [layer() if mixing is Mixing.M2RNN else Attention(hidden, device, dtype) for mixing in mixings]
    return Hybrid([Block(mixer, hidden, device, dtype) for mixer in mixers])


def hidden_dim(name: str) -> int | None:
    """Return the dim of a parameter, of a layer or a hybrid, that is the model's width; None if there is none."""
    return next((dim for end, dim in HIDDEN_DIMS.items() if f".{name}".endswith(f".{end}")), None)


def reordered(name: str, x: Tensor, order: Tensor) -> Tensor:
    """Return a parameter, or its gradient, of a model whose width has another order."""
    dim = hidden_dim(name)
    return x if dim is None else x.index_select(dim, order)
