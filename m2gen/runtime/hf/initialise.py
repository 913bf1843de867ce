"""Initialisation as published: normal weights, those before the residual stream scaled by depth."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import initialization

from ..convolution import DepthwiseConv1d
from ..gate import DecayGate
from ..layer import M2RNN
from ..norm import RMSNorm
from .configuration import M2RNNConfig

Linear = TypeVar("Linear", bound=nn.Module)
DEEP = "m2rnn_is_deep"
"""Attribute of the linear layers whose results are added to the residual stream."""


class Experts(nn.Module):
    """Linear maps (experts, outputs, inputs), each of its own tokens."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs))

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """Map x (T, inputs), the first ``counts[0]`` tokens by the first expert, to (T, outputs)."""
        parts = torch.split(x, counts)
        return torch.cat([part @ weight.mT for part, weight in zip(parts, self.weight, strict=True)])


def deep(linear: Linear) -> Linear:
    """Return a linear layer marked as one whose results are added to the residual stream."""
    setattr(linear, DEEP, True)
    return linear


def initialise(module: nn.Module, config: M2RNNConfig) -> None:
    """Draw the parameters of a module, without its children's, that no checkpoint has given."""
    if isinstance(module, nn.Linear | DepthwiseConv1d | Experts):
        fan_in = module.weight.shape[-1]  # of the convolution, which is depthwise, its width
        scale = math.sqrt(2 * config.num_layers) if config.use_depth_scaled_init and hasattr(module, DEEP) else 1.0
        initialization.normal_(module.weight, std=std_of(config, config.init_method, fan_in) / scale)
        if not isinstance(module, Experts) and module.bias is not None:
            initialization.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        method = "normal" if config.embedding_init_method == "mup" else config.embedding_init_method
        initialization.normal_(module.weight, std=std_of(config, method, module.embedding_dim))
    elif isinstance(module, RMSNorm | nn.LayerNorm):
        initialization.ones_(module.weight)
        if isinstance(module, nn.LayerNorm):
            initialization.zeros_(module.bias)
    elif isinstance(module, M2RNN):
        if module.D is not None:
            initialization.ones_(module.D)
        eye = torch.eye(module.head_dim, device=module.state_weight.device)
        initialization.copy_(module.state_weight, eye.expand(module.state_weight.shape))
    elif isinstance(module, DecayGate):
        _draw_gate(module)


def std_of(config: M2RNNConfig, method: str, fan_in: int) -> float:
    """Return the standard deviation of a weight of so many inputs, before any scaling by depth."""
    if method == "fan_in":
        return float(fan_in**-0.5)
    std = float(config.initializer_range)
    return std / float(config.m_width) ** 0.5 if method == "mup" and config.m_width is not None else std


def _draw_gate(gate: DecayGate) -> None:
    """Draw both parameters of a gate, and keep those that are there already."""
    drawn = copy.deepcopy(gate)
    drawn.reset_parameters()
    initialization.copy_(gate.A_log, drawn.A_log)
    initialization.copy_(gate.dt_bias, drawn.dt_bias)
