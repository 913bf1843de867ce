"""The layer that a configuration's M2RNN block describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ..checkpoints import CONFIG, CheckpointError
from ..facts import Backend
from ..layer import M2RNN
from .configuration import M2RNNConfig
from .initialise import deep

ONLY: dict[str, Any] = {"use_residual": True, "activation_function": "silu", "normalization_function": "rmsnorm"}


def m2rnn_of(config: M2RNNConfig, block: Mapping[str, Any], i: int) -> M2RNN:
    """Return the mixer of layer i; raises VariantNotBuiltError where the package has no kernels for it."""
    where = f"{CONFIG}: $.sequence_mixer_blocks[{i}]"
    for key, value in ONLY.items():
        if block.get(key, value) != value:
            raise CheckpointError(f"{where}.{key} must be {value!r}, got {block[key]!r}")
    names = {"q": "q", "k": "k", "v": "v", "f": "f", "w": "weight", "g": "g"}
    layer = M2RNN(
        config.hidden_size,
        block["k_head_dim"],
        block["v_head_dim"],
        {name: block[f"num_{key}_heads"] for name, key in names.items()},
        conv_width=block["kernel_size"],
        bias=block["add_bias"],
        clip=block["gradient_clipping"],
        backend=cast(Backend, config.backend),
    )
    deep(layer.output_projection)
    return layer
