"""Initial values of the layer's parameters."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from .mixer import Mixer

__all__ = ["Initialisation"]

Method: TypeAlias = Literal["fan_in", "normal"]


@dataclass(frozen=True)
class Initialisation:
    """Distributions that a layer's parameters are drawn from, as published.

    Weights of projections and of the convolution are normal with a standard deviation of fan-in**-0.5, or of ``std``
    with the method "normal"; that of the output projection is divided by sqrt(2 ``layers``) where ``layers``, the
    model's, is given. Biases are 0, the state weight is the identity, and D and norms are 1.

    Raises ValueError for a method that is neither, or ranges that are empty.
    """

    method: Method = "fan_in"
    std: float = 0.02
    """Standard deviation with the method "normal"; published configurations call it initializer_range."""
    layers: int | None = None
    """Layers of the model, by which the output projection is scaled; None for no scaling by depth."""
    A_range: tuple[float, float] = (0.0, 16.0)
    """exp(A_log) is drawn uniformly from this range."""
    dt_range: tuple[float, float] = (1e-3, 0.1)
    """softplus(dt_bias) is drawn from this range, its logarithm uniformly."""
    dt_floor: float = 1e-4
    """softplus(dt_bias) is at least this."""

    def __post_init__(self) -> None:
        if self.method not in ("fan_in", "normal"):
            raise ValueError(f"M2RNN: init.method must be fan_in or normal, got {self.method!r}")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"M2RNN: init.layers must be at least 1 or None, got {self.layers}")
        if not 0 <= self.A_range[0] <= self.A_range[1]:
            raise ValueError(f"M2RNN: init.A_range must be two numbers from 0 on, in order, got {self.A_range}")
        if not 0 < self.dt_range[0] <= self.dt_range[1]:
            raise ValueError(f"M2RNN: init.dt_range must be two numbers above 0, in order, got {self.dt_range}")

    def scale(self, fan_in: int) -> float:
        """Return the standard deviation of a weight."""
        return self.std if self.method == "normal" else float(fan_in) ** -0.5


@torch.no_grad()
def draw(layer: Mixer, init: Initialisation) -> None:
    """Draw every parameter of a layer anew; its gate and norm know how to draw theirs."""
    for name in ("input_projection", "conv1d", "output_projection"):
        module = getattr(layer, name)
        if module is not None:
            # a depthwise convolution's weight is (C, 1, width)
            fan_in = module.weight.shape[-1]
            depth = init.layers if name == "output_projection" else None
            nn.init.normal_(module.weight, std=init.scale(fan_in) / (1.0 if depth is None else math.sqrt(2 * depth)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for child in (layer.decay_gate, layer.g_norm):
        reset = getattr(child, "reset_parameters", None)
        if callable(reset):
            reset()
    if layer.D is not None:
        nn.init.ones_(layer.D)
    eye = torch.eye(layer.head_dim, device=layer.state_weight.device, dtype=layer.state_weight.dtype)
    _assign(layer.state_weight, eye.expand(layer.state_weight.shape).contiguous())


@torch.no_grad()
def draw_gate(A_log: Tensor, dt_bias: Tensor, init: Initialisation) -> None:
    """Draw exp(A_log) uniform and softplus(dt_bias) log-uniform."""
    tiny = torch.finfo(A_log.dtype).tiny  # a drawn 0 would be a head that never changes
    A_log.uniform_(*init.A_range).clamp_(min=tiny).log_()
    dt = dt_bias.uniform_(*map(math.log, init.dt_range)).exp().clamp(min=init.dt_floor)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt


def _assign(parameter: Tensor, value: Tensor) -> None:
    """Copy ``value``, the same on every rank, to a parameter that may be sharded over ranks."""
    tensor = sys.modules.get("torch.distributed.tensor")  # importing it takes seconds; who shards has done so
    if tensor is not None and isinstance(parameter, tensor.DTensor):
        placed = parameter.device_mesh, parameter.placements
        value = tensor.distribute_tensor(value, *placed, src_data_rank=None)
    parameter.copy_(value)
