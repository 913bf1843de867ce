"""The published language models for transformers, which only importing this needs: version 5.24 or later.

    from PACKAGE.hf import M2RNNForCausalLM
    model = M2RNNForCausalLM.from_pretrained(FOLDER)  # of the published implementation, or of ``save_pretrained``

Folders' ``model_type`` is ``gpt_base``; importing this has transformers' Auto classes make these classes of it. Of
several packages in a process the one imported last answers; ``register`` has this one answer again.
"""

from __future__ import annotations

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

OLDEST = (5, 24)
if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
    raise ImportError(f"transformers must be 5.24 or later, got {transformers.__version__}")

from .configuration import M2RNNConfig  # noqa: E402  (older versions have no such modules)
from .modeling import M2RNNForCausalLM, M2RNNModel  # noqa: E402

__all__ = ["M2RNNConfig", "M2RNNForCausalLM", "M2RNNModel", "register"]


def register() -> None:
    """Have transformers' Auto classes make this package's classes of the published ``model_type``.

    Its Trainer shifts labels for label smoothing only of classes whose names it knows to be causal models.
    """
    AutoConfig.register(M2RNNConfig.model_type, M2RNNConfig, exist_ok=True)
    AutoModel.register(M2RNNConfig, M2RNNModel, exist_ok=True)
    AutoModelForCausalLM.register(M2RNNConfig, M2RNNForCausalLM, exist_ok=True)
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(M2RNNConfig.model_type, M2RNNForCausalLM.__name__)


register()
