"""One layer of the published language model: a mixer and an MLP."""

# mypy: allow-untyped-calls
# since functions of transformers have no types

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..layer import M2RNN
from ..norm import RMSNorm
from .attention import SoftmaxAttention
from .blocks import ExpertsBlock, attention_block, mlp_block
from .caching import entry_of, mix
from .configuration import M2RNN_LAYER, M2RNNConfig
from .experts import MixtureOfExperts
from .mixing import m2rnn_of
from .mlp import MLP
from .packing import Packed


def norm_of(config: M2RNNConfig) -> nn.Module:
    """Return one of the norms around mixers and MLPs."""
    if config.normalization_function == "layernorm":
        return nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
    return RMSNorm(config.hidden_size, config.layer_norm_epsilon)


class M2RNNBlock(GradientCheckpointingLayer):
    """A mixer, which is an M2RNN or attention, and an MLP, each added to what it is given a norm of."""

    def __init__(self, config: M2RNNConfig, number: int) -> None:
        super().__init__()
        self.number, self.kind, self.scale = number, config.layer_types[number], config.m_residual
        block = (config.sequence_mixer_blocks or [])[number]
        self.ln_1 = norm_of(config)
        if self.kind == M2RNN_LAYER:
            self.sequence_mixer: nn.Module = m2rnn_of(config, block, number)
        else:
            self.sequence_mixer = SoftmaxAttention(config, attention_block(block, number, config.hidden_size), number)
        self.ln_2 = norm_of(config)
        mlp = mlp_block((config.mlp_blocks or [])[number], number)
        if isinstance(mlp, ExpertsBlock):
            self.mlp_block: nn.Module = MixtureOfExperts(config.hidden_size, mlp, number)
        else:
            self.mlp_block = MLP(config.hidden_size, mlp, number)

    def forward(
        self,
        hidden_states: Tensor,
        masks: dict[str, Any] | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        packed: Packed | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map hidden_states (B, S, hidden_size) to the same shape; also return how unevenly experts were chosen."""
        x, mask = self.ln_1(hidden_states), (masks or {}).get(self.kind)
        mixer = self.sequence_mixer
        if isinstance(mixer, M2RNN):
            entry = None if cache is None else entry_of(cache, self.number)
            mixed = mix(mixer, x, entry, mask, packed)
        else:
            mixed, _ = mixer(x, mask, position_embeddings, cache, **kwargs)
        hidden_states = hidden_states + self._scaled(mixed)
        y = self.mlp_block(self.ln_2(hidden_states))
        y, uneven = y if isinstance(y, tuple) else (y, None)
        return hidden_states + self._scaled(y), uneven

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.scale is None else x * self.scale
