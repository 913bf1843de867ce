"""The configuration of a model that flame builds."""

# mypy: allow-untyped-calls
# since functions of transformers have no types

from __future__ import annotations

import copy
from typing import Any, ClassVar

from transformers import PretrainedConfig

DEFAULT_MIXER: dict[str, Any] = {
    "state_expansion": 64, "head_dim": 16, "heads": {"q": 1, "k": 1, "v": 84, "f": 84, "w": 84},
}  # fmt: skip
"""The mixer of the published 410M model."""
BLOCK = 256
"""Sizes of hidden layers are multiples of this, as in models of flash-linear-attention."""


class FlameM2RNNConfig(PretrainedConfig):
    """Keys as models of flash-linear-attention have them, and ``mixer``: the arguments of each layer's ``M2RNN``.

    The MLP has ``intermediate_size``, or two thirds of ``hidden_ratio`` times ``hidden_size``, rounded up to 256. With
    ``fuse_linear_cross_entropy`` flash-linear-attention's loss computes logits and loss together.

    Raises TypeError for a ``mixer`` that is no mapping.
    """

    model_type: ClassVar[str] = "flame_m2rnn"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        mixer: dict[str, Any] | None = None,
        hidden_ratio: int = 4,
        intermediate_size: int | None = None,
        norm_eps: float = 1e-5,
        vocab_size: int = 32000,
        initializer_range: float = 0.02,
        use_depth_scaled_init: bool = True,
        fuse_linear_cross_entropy: bool = False,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if mixer is not None and not isinstance(mixer, dict):
            raise TypeError(f"config.json: $.mixer must be a mapping, got {mixer!r}")
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.mixer = copy.deepcopy(DEFAULT_MIXER) if mixer is None else mixer  # whoever changes it has their own
        self.hidden_ratio, self.intermediate_size = hidden_ratio, intermediate_size
        self.norm_eps, self.vocab_size = norm_eps, vocab_size
        self.initializer_range, self.use_depth_scaled_init = initializer_range, use_depth_scaled_init
        self.fuse_linear_cross_entropy, self.use_cache = fuse_linear_cross_entropy, use_cache
        given: dict[str, Any] = {
            "tie_word_embeddings": tie_word_embeddings, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        }  # fmt: skip
        super().__init__(**given, **kwargs)

    @property
    def inner_size(self) -> int:
        """The size of an MLP's hidden layer."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        size = int(self.hidden_size * self.hidden_ratio * 2 / 3)
        return BLOCK * ((size + BLOCK - 1) // BLOCK)
