"""Decay parameters under flame's FSDP, whose mixed precision would round them."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from ...sharding import fully_shard_decay

PARALLELIZE = "flame.models.parallelize_fla"
"""The module whose ``apply_fsdp`` shards a model's blocks, which flame's command imports before models."""
DONE = "m2rnn_keeps_decay"


def keep_decay() -> bool:
    """Have flame shard decay parameters by themselves, in float32, before blocks; return whether flame is imported."""
    module: Any = sys.modules.get(PARALLELIZE)
    apply = getattr(module, "apply_fsdp", None)
    if apply is None:
        return False
    if not hasattr(apply, DONE):
        module.apply_fsdp = _keeping(apply)
    return True


def _keeping(apply: Any) -> Any:
    """Return ``apply_fsdp`` after the decay parameters' own."""

    @functools.wraps(apply)
    def apply_fsdp(model: nn.Module, dp_mesh: Any, *rest: Any, **options: Any) -> None:
        offloads = options.get("cpu_offload", False)
        fully_shard_decay(model, mesh=dp_mesh, **({"offload_policy": CPUOffloadPolicy()} if offloads else {}))
        apply(model, dp_mesh, *rest, **options)

    setattr(apply_fsdp, DONE, True)
    return apply_fsdp
