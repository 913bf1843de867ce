"""Layers without a state of their own, whose forward may replace that of a layer with these attributes."""

from __future__ import annotations

from torch import Tensor, nn

from .cache import M2RNNCache
from .facts import Backend, HeadCounts
from .forward import run

__all__ = ["M2RNN"]


class M2RNNForward(nn.Module):
    """The forward of ``layer.M2RNN`` on the kernels of this package, whoever made the children, which it calls."""

    can_torch_compile: bool = True

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
    input_projection: nn.Module
    conv1d: nn.Module | None
    decay_gate: nn.Module
    state_weight: Tensor
    D: Tensor | None
    g_norm: nn.Module
    output_projection: nn.Module

    def forward(
        self,
        x: Tensor,
        cache: M2RNNCache | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> Tensor:
        """Do what ``layer.M2RNN.forward`` does."""
        return run(self, x, cache, attention_mask, cu_seqlens, cu_seqlens_cpu)


M2RNN = M2RNNForward
