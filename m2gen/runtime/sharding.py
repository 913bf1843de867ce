"""FSDP of models with these layers: decay parameters, which mixed precision must not round."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from .gate import WideParameters

__all__ = ["fully_shard_decay"]


def fully_shard_decay(model: nn.Module, *, reduce_dtype: Any = None, **options: Any) -> None:
    """Shard the decay parameters of all layers of a model, in groups that mixed precision leaves in float32.

    Call it before ``fully_shard`` of anything that holds them: that casts every parameter which is not sharded yet to
    its policy's ``param_dtype``, and refuses a module whose parameters differ in dtype. ``options`` are those of
    ``fully_shard``, such as ``mesh``, except ``mp_policy``; ``reduce_dtype`` is the policy's.
    """
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    for module in list(model.modules()):
        if isinstance(module, WideParameters):
            fully_shard(module, mp_policy=policy, **{"reshard_after_forward": False, **options})
