"""The parts that a module must have to run as an ``M2RNN``: its own, or a rank's share of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from .facts import Backend, HeadCounts

Device: TypeAlias = torch.device | str | int | None


class Mixer(Protocol):
    """A module with the dims, heads and children of an ``M2RNN``, whoever made the children."""

    hidden_size: int
    state_expansion: int
    head_dim: int
    heads: HeadCounts
    total_heads: int
    gate_heads: int
    forget_inputs: int
    conv_width: int | None
    activation: str | None
    round_gate: bool
    clip: float | None
    backend: Backend

    @property
    def input_projection(self) -> nn.Module:
        """Give q, k and v, the forget gate's input and the output gate of x."""

    @property
    def conv1d(self) -> nn.Module | None:
        """Convolve q, k and v; None for a layer without a convolution."""

    @property
    def decay_gate(self) -> nn.Module:
        """Give the forget gate of its input."""

    @property
    def state_weight(self) -> Tensor:
        """The recurrence's weight, (Nw, V, V)."""

    @property
    def D(self) -> Tensor | None:
        """Weight of v where it bypasses the recurrence, (N, V); None where nothing does."""

    @property
    def g_norm(self) -> nn.Module:
        """Normalise all heads."""

    @property
    def output_projection(self) -> nn.Module:
        """Give the result of all heads."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give the module's parameters and its children's."""


def operand_sizes(layer: Mixer) -> tuple[int, int, int]:
    """Return the channels of q, k and v, which are convolved together."""
    heads = layer.heads
    return heads.q * layer.state_expansion, heads.k * layer.state_expansion, heads.v * layer.head_dim


def split_sizes(layer: Mixer) -> tuple[int, int, int]:
    """Return the channels that the input projection gives to the convolution, the forget gate and the output gate."""
    return sum(operand_sizes(layer)), layer.forget_inputs, layer.gate_heads * layer.head_dim


def shapes_of(layer: Mixer, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of conv and state of ``batch`` sequences."""
    conv = (batch, (layer.conv_width or 1) - 1, sum(operand_sizes(layer)))
    return conv, (batch, layer.total_heads, layer.state_expansion, layer.head_dim)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return float32, or x's dtype where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def wants_gradients(layer: Mixer, *given: Tensor | None) -> bool:
    """Whether a call on these tensors, of inputs and states, is to be differentiated."""
    if not torch.is_grad_enabled():
        return False
    return any(x is not None and x.requires_grad for x in given) or any(p.requires_grad for p in layer.parameters())


def known(condition: Any) -> bool:
    """Whether a condition on sizes holds; False where a compiler would learn it from the data alone."""
    if isinstance(condition, bool | Tensor):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # what it imports takes a while

    return guard_or_false(condition)
