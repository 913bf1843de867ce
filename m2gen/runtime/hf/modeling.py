"""The published language model: M2RNN blocks and attention, each followed by an MLP, for transformers."""

# mypy: allow-untyped-calls, allow-untyped-decorators
# since functions of transformers have no types

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeCausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..checkpoints import CheckpointError
from ..optimizer import MarksNoWeightDecay
from .attention import SoftmaxAttention, rotations
from .block import M2RNNBlock, norm_of
from .configuration import FULL_ATTENTION, M2RNNConfig
from .initialise import initialise
from .masks import masks_of
from .packing import found_in, packed_of


class M2RNNPreTrainedModel(MarksNoWeightDecay, PreTrainedModel):
    """What both models are to transformers."""

    config: M2RNNConfig
    config_class = M2RNNConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "wte"
    _no_split_modules = ["M2RNNBlock"]  # noqa: RUF012  (transformers reads a list of the class)
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias"}  # noqa: RUF012
    _can_record_outputs = {"hidden_states": M2RNNBlock, "attentions": SoftmaxAttention}  # noqa: RUF012
    _is_stateful = True  # a state does not say what it was before a candidate of assisted generation
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config)


@dataclass
class M2RNNModelOutput(BaseModelOutputWithPast):
    """Hidden states, and the sum over layers of how unevenly experts were chosen."""

    aux_loss: Tensor | None = None


class M2RNNModel(M2RNNPreTrainedModel):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: M2RNNConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(M2RNNBlock(config, i) for i in range(config.num_layers))
        self.ln_f = norm_of(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seqlens_cpu: Any = None,
        **kwargs: Any,
    ) -> M2RNNModelOutput:
        """Return hidden states of input_ids (B, S) or inputs_embeds (B, S, hidden_size), after what a cache has seen.

        attention_mask (B, past + S) is true, or not 0, at tokens. Sequences that lie one after the other in a row are
        apart where ``cu_seq_lens_q`` says so, or, with neither mask nor cache, where position_ids begin anew. With
        ``cu_seqlens_cpu``, a copy of the former on the CPU, an array or numbers, nothing waits for the device.

        A cache is made where ``use_cache`` is true, but neither for training nor of several sequences in a row.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("M2RNN: exactly one of input_ids and inputs_embeds must be given")
        x: Tensor = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        packed, numbers = packed_of(cu_seq_lens_q, cu_seqlens_cpu), None
        if packed is not None:
            numbers = packed.numbers(x)
            position_ids = packed.positions(numbers) if position_ids is None else position_ids
            kwargs = {**packed.for_attention(), **kwargs}
        elif position_ids is not None and attention_mask is None and cache is None:
            packed = found_in(position_ids, x.shape[0])
        trains = self.training and torch.is_grad_enabled()
        if use_cache and cache is None and packed is None and not trains:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen)[None]
        if isinstance(attention_mask, dict):
            masks = attention_mask
        else:
            masks = masks_of(self.config, x, attention_mask, cache, position_ids, numbers)
        if self.config.m_emb is not None:
            x = x * self.config.m_emb
        x = F.dropout(x, self.config.embedding_dropout, self.training)
        rotary = self._rotations(position_ids)
        losses = []
        for block in self.h:
            x, uneven = block(
                x, masks=masks, position_embeddings=rotary, cache=cache, packed=packed,
                position_ids=position_ids, **kwargs,
            )  # fmt: skip
            losses += [] if uneven is None else [uneven]
        return M2RNNModelOutput(
            last_hidden_state=self.ln_f(x), cache=cache, aux_loss=torch.stack(losses).sum() if losses else None
        )

    def _rotations(self, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        config = self.config
        if config.position_embedding_type != "rope" or FULL_ATTENTION not in config.layer_types:
            return None
        return rotations(position_ids, config.rotary_size, config.rope_theta)


class M2RNNForCausalLM(M2RNNPreTrainedModel, GenerationMixin):
    """The model with logits of the next token, its loss, and ``generate``."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: M2RNNConfig) -> None:
        super().__init__(config)
        self.transformer = M2RNNModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *arguments: Any, output_loading_info: bool = False, **options: Any
    ) -> Any:
        """Do what transformers' method does; raises CheckpointError for a missing or an unexpected weight."""
        place = pretrained_model_name_or_path
        model, report = super().from_pretrained(place, *arguments, output_loading_info=True, **options)
        for kind in ("missing", "unexpected"):
            if found := sorted(report[f"{kind}_keys"]):
                raise CheckpointError(f"{place}: weights must be those of the model, {kind} {', '.join(found[:3])}")
        return (model, report) if output_loading_info else model

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits (B, S, vocab_size), and the loss where labels (B, S) are given; -100 is no label.

        In training ``router_aux_loss_coef`` times the sum of layers' auxiliary losses is a part of it.

        ``logits_to_keep`` is how many of the last positions have logits, all if 0, or which ones. Arguments else are
        those of ``M2RNNModel.forward``.
        """
        outputs = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        if self.config.m_width is not None:
            logits = logits / self.config.m_width
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training and outputs.aux_loss is not None:
                loss = loss + (self.config.router_aux_loss_coef or 0.0) * outputs.aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=outputs.aux_loss, logits=logits, cache=outputs.cache,
            hidden_states=outputs.hidden_states, attentions=outputs.attentions,
        )  # fmt: skip

    def _get_static_cache_init_shape(self) -> None:
        """Have static caches allocate in their first call, as only the layers know what they hold."""

    @staticmethod
    def create_masks_for_generate(
        config: M2RNNConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return every mask of a call, as ``generate`` asks for before what it compiles."""
        return masks_of(config, inputs_embeds, attention_mask, cache, position_ids)
