"""The MLPs of the published models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from ..activations import ACTIVATIONS
from ..checkpoints import CONFIG, CheckpointError
from .blocks import MLPBlock
from .initialise import deep

GATES = {
    "ceglu": "celu", "eglu": "elu", "geglu": "gelu", "glu": "sigmoid", "miglu": "mish", "mishglu": "mish",
    "reglu": "relu", "seglu": "selu", "sigmoid_glu": "sigmoid", "swiglu": "swish",
}  # fmt: skip
"""Activations of gates, by the published names of gated ones."""


def activation_of(block: MLPBlock, i: int) -> Callable[[Tensor], Tensor]:
    """Return what layer i makes of its first projection (..., size or 2 size): (..., size).

    Even columns are the gate of the odd ones, where it is gated. Raises CheckpointError for a name that is none.
    """
    name = GATES.get(block.activation, block.activation)
    if name not in ACTIVATIONS:
        known = ", ".join((*ACTIVATIONS, *GATES))
        where = f"{CONFIG}: $.mlp_blocks[{i}].activation_function"
        raise CheckpointError(f"{where} must be among {known}, got {block.activation!r}")
    function = ACTIVATIONS[name]
    return partial(_gated, function) if block.gated else function


def _gated(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the odd columns of x, each times the activation of the even one before it."""
    return x[..., 1::2] * function(x[..., ::2])


class MLP(nn.Module):
    """The MLP of layer i."""

    def __init__(self, hidden_size: int, block: MLPBlock, i: int) -> None:
        super().__init__()
        self.block, self.activation = block, activation_of(block, i)
        self.c_fc = nn.Linear(hidden_size, block.size * (1 + block.gated), bias=block.bias)
        self.c_proj = deep(nn.Linear(block.size, hidden_size, bias=block.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., hidden_size) to the same shape."""
        return F.dropout(self.c_proj(self.activation(self.c_fc(x))), self.block.dropout, self.training)
