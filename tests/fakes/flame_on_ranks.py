"""Steps of flame's training on ranks of this host, with its way to build, shard and draw a model."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from ranks import gathered, serve
from torch import Tensor, nn
from torch.distributed import get_rank, get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

PARALLELIZE = "flame.models.parallelize_fla"
STEPS = 4


def apply_fsdp(model: nn.Module, dp_mesh: Any, param_dtype: Any, reduce_dtype: Any) -> None:
    """Shard blocks and then the model, as flame does, which finds blocks by the names of flash-linear-attention."""
    options: dict[str, Any] = {"mesh": dp_mesh, "mp_policy": MixedPrecisionPolicy(param_dtype, reduce_dtype)}
    for block in getattr(model, model.base_model_prefix).layers:
        fully_shard(block, **options, reshard_after_forward=True)
    fully_shard(model, **options)


@dataclass
class Subject:
    """The configuration's file, and flame's module, whose function a package may have replaced."""

    config: Path
    parallelize: Any


def prepare(folder: Path) -> Subject:
    """Import a package where flame runs."""
    parallelize: Any = ModuleType(PARALLELIZE)
    parallelize.apply_fsdp = apply_fsdp
    sys.modules[PARALLELIZE] = parallelize
    sys.path.insert(0, str(folder))
    flame = importlib.import_module("on_flame.integrations.flame")
    assert flame.keep_decay()  # a second call replaces nothing more
    assert parallelize.apply_fsdp.__wrapped__ is apply_fsdp
    return Subject(folder / "config.json", parallelize)


def built(subject: Subject) -> nn.Module:
    """Return the model as flame makes it: on the meta device, sharded, and drawn on its device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(subject.config))
        model.apply(lambda module: setattr(module, "_is_hf_initialized", False))
    mesh = init_device_mesh("cpu", (get_world_size(),))
    subject.parallelize.apply_fsdp(model, mesh, torch.bfloat16, torch.float32)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.post_init()
    return model.train()


def batch(rank: int) -> dict[str, Tensor]:
    """Return a packed batch of one rank."""
    ids = torch.randint(3, 50, (1, 11), generator=torch.Generator().manual_seed(rank))
    return {"input_ids": ids, "labels": ids, "cu_seqlens": torch.tensor([0, 4, 11], dtype=torch.int32)}


def trains(subject: Subject) -> None:
    """Losses fall; products are in bf16 and decay parameters in float32; values drawn are as published."""
    torch.manual_seed(0)
    model = built(subject)
    gates = [module for name, module in model.named_modules() if name.endswith("decay_gate")]
    assert len(gates) == 2
    seen: set[torch.dtype] = set()
    for gate in gates:
        gate.register_forward_pre_hook(lambda module, _: seen.update(p.dtype for p in module.parameters()))
        A, dt = gate.A_log.full_tensor().exp(), nn.functional.softplus(gate.dt_bias.full_tensor())
        assert bool(((A > 0) & (A <= 16) & (dt > 0.9e-3) & (dt < 0.11)).all())
    weights = {name: p.full_tensor() for name, p in model.named_parameters()}
    assert [name for name, x in weights.items() if not x.isfinite().all()] == []
    down = weights["model.layers.0.mlp.down_proj.weight"].std().item()
    assert abs(down - 0.02 / 2) < 0.002
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(STEPS):
        out = model(**batch(get_rank()), position_ids=None)
        assert out.logits.dtype == torch.bfloat16
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert all(losses[-1] < losses[0] for losses in gathered(losses)), json.dumps(losses)
    assert seen == {torch.float32}


CHECKS = {"trains": trains}

if __name__ == "__main__":
    serve(CHECKS, prepare)
