"""The layer that a configuration's M2RNN block describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ..checkpoints import arguments_of
from ..facts import Backend
from ..init import Initialisation
from ..layer import M2RNN
from .configuration import M2RNNConfig
from .initialise import deep, std_of


def m2rnn_of(config: M2RNNConfig, block: Mapping[str, Any], i: int) -> M2RNN:
    """Return the mixer of layer i.

    Raises CheckpointError for a block that no layer has, and VariantNotBuiltError where the package has no kernels.
    """
    arguments_of(block, i)  # raises with the key's place
    depth = config.num_layers if config.use_depth_scaled_init else None
    if config.init_method == "fan_in":
        init = Initialisation(layers=depth)
    else:
        init = Initialisation("normal", std_of(config, config.init_method, 1), depth)
    layer = M2RNN.from_config(
        block, config.hidden_size, backend=cast(Backend, config.backend), round_gate=config.round_gate, init=init
    )
    deep(layer.output_projection)
    return layer
