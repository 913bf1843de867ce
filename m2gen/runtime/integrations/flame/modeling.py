"""The model: what flame's parallelism looks for in one of flash-linear-attention has the same names here."""

# mypy: allow-untyped-calls
# since functions of transformers have no types

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from ...convolution import DepthwiseConv1d
from ...gate import DecayGate
from ...init import Initialisation
from ...layer import M2RNN
from ...norm import RMSNorm
from ...optimizer import MarksNoWeightDecay
from ..fla import M2RNNLayer
from .configuration import FlameM2RNNConfig

NO_LABEL = -100
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in outputs, which some versions of transformers have changed."""
DEEP = "m2rnn_is_deep"
"""Attribute of linear layers whose results are added to the residual stream, which initialisation scales by depth."""


class FlameMLP(nn.Module):
    """A SwiGLU MLP."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias=False)
        self.up_proj = nn.Linear(hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., hidden_size) to the same shape."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class FlameM2RNNBlock(GradientCheckpointingLayer):
    """A layer and an MLP, each added to what it is given a norm of."""

    def __init__(self, config: FlameM2RNNConfig, layer_idx: int) -> None:
        super().__init__()
        depth = config.num_hidden_layers if config.use_depth_scaled_init else None
        init = Initialisation("normal", config.initializer_range, depth)
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = M2RNNLayer(config.hidden_size, layer_idx=layer_idx, **{"init": init, **config.mixer})
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FlameMLP(config.hidden_size, config.inner_size)
        if config.use_depth_scaled_init:
            for linear in (self.attn.mixer.output_projection, self.mlp.down_proj):
                setattr(linear, DEEP, True)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map hidden_states (B, S, hidden_size) to the same shape; ``kwargs`` are the layer's."""
        mixed, _, _ = self.attn(hidden_states=self.attn_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + mixed
        y: Tensor = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return y


class FlameM2RNNPreTrainedModel(MarksNoWeightDecay, PreTrainedModel):
    """What both models are to transformers."""

    config: FlameM2RNNConfig
    config_class = FlameM2RNNConfig
    base_model_prefix = "model"
    _input_embed_layer = "embeddings"
    supports_gradient_checkpointing = True
    _is_stateful = True  # a state does not say what it was before a candidate of assisted generation
    _no_split_modules = ["FlameM2RNNBlock"]  # noqa: RUF012  (transformers reads a list of the class)
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias"}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, M2RNN | DecayGate):  # a layer comes after its children, and draws them as published
            _drawn(module)
        elif isinstance(module, nn.Linear | nn.Embedding | DepthwiseConv1d):
            depth = 2 * self.config.num_hidden_layers if hasattr(module, DEEP) else 1
            nn.init.normal_(module.weight, std=std / math.sqrt(depth))
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(cast(Tensor, module.bias))
        elif isinstance(module, RMSNorm):
            module.reset_parameters()


def _drawn(module: M2RNN | DecayGate) -> None:
    """Draw a module's parameters, and keep those that a checkpoint has given."""
    given = [(p, p.detach().clone()) for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
    module.reset_parameters()
    for parameter, value in given:
        parameter.copy_(value)


class FlameM2RNNModel(FlameM2RNNPreTrainedModel):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: FlameM2RNNConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(FlameM2RNNBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states of input_ids (B, S) or inputs_embeds (B, S, hidden_size), after what a cache has seen.

        Arguments else are ``M2RNNLayer``'s. A cache is made, which needs flash-linear-attention, where ``use_cache`` is
        true and none is given; ``cache`` is another name of it.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("M2RNN: exactly one of input_ids and inputs_embeds must be given")
        if use_cache and past_key_values is None:
            past_key_values = importlib.import_module("fla.models.utils").Cache()
        x: Tensor = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if kwargs.get("cu_seqlens") is None:
            attention_mask = _where_padded(attention_mask, x.shape[1])
        for layer in self.layers:
            x = layer(x, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: past_key_values})


def _where_padded(attention_mask: Tensor | None, steps: int) -> Tensor | None:
    """Return a mask, or None where the last ``steps`` positions are tokens; asking waits for the device."""
    if attention_mask is None or torch.compiler.is_compiling() or attention_mask.is_meta:
        return attention_mask
    return None if bool(attention_mask[:, -steps:].all()) else attention_mask


class FlameM2RNNForCausalLM(FlameM2RNNPreTrainedModel, GenerationMixin):
    """The model with logits of the next token, their loss, ``criterion``'s where flame sets one, and ``generate``."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: FlameM2RNNConfig) -> None:
        super().__init__(config)
        self.model = FlameM2RNNModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.criterion: Callable[..., Tensor] | None = None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, and the loss of the next tokens where labels (B, S) are given; -100 is no label.

        ``logits_to_keep`` is how many of the last positions have logits, all if 0. Arguments else are the model's.
        """
        outputs = self.model(input_ids, attention_mask, inputs_embeds, past_key_values, use_cache, **kwargs)
        x = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            labels = F.pad(labels[:, 1:], (0, 1), value=NO_LABEL)
        if labels is not None and self.config.fuse_linear_cross_entropy:
            loss = self._fused()(x, labels, self.lm_head.weight, self.lm_head.bias)
        else:
            logits = self.lm_head(x[:, -logits_to_keep:])
            if labels is not None:
                loss = (self.criterion or F.cross_entropy)(logits.float().flatten(0, 1), labels.flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: outputs.get(CACHE)})

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes flash-linear-attention's

    def _fused(self) -> Callable[..., Tensor]:
        """Return the loss that flame has set, or flash-linear-attention's."""
        if self.criterion is None:
            self.criterion = importlib.import_module("fla.modules").FusedLinearCrossEntropyLoss()
        return self.criterion
