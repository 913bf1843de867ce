"""A language model that flame builds from a configuration; it needs transformers.

    bash train.sh ... --model.config CONFIG.json --experimental.custom_model_path PACKAGE.integrations.flame

Importing this has transformers' Auto classes make these classes of the ``model_type`` ``flame_m2rnn``, and has flame,
where it is running, keep decay parameters out of FSDP's mixed precision. Of several packages in a process the one
imported last answers; ``register`` has this one answer again.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration import FlameM2RNNConfig
from .modeling import FlameM2RNNForCausalLM, FlameM2RNNModel
from .sharding import keep_decay

__all__ = ["FlameM2RNNConfig", "FlameM2RNNForCausalLM", "FlameM2RNNModel", "keep_decay", "register"]


def register() -> None:
    """Have transformers' Auto classes make this package's classes of the ``model_type`` of flame's models."""
    AutoConfig.register(FlameM2RNNConfig.model_type, FlameM2RNNConfig, exist_ok=True)
    AutoModel.register(FlameM2RNNConfig, FlameM2RNNModel, exist_ok=True)
    AutoModelForCausalLM.register(FlameM2RNNConfig, FlameM2RNNForCausalLM, exist_ok=True)


register()
keep_decay()
