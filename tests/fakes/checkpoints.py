"""Folders of the published implementation's checkpoints, and a package that runs them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from leftovers import kept_registries
from safetensors.torch import save_file
from support import ROOT, SCHEDULES, build_package, import_package, make_variant
from torch import Tensor

HYBRIDS = ROOT / "tests" / "runtime" / "data" / "lm_engine"
"""What small hybrid models of the published implementation gave, and their configurations."""
HEADS = (1, 1, 4, 4, 4)
PARAMETERS = ("transformer.", "lm_head.")
MODEL_NAMES = ("hybrid_nope", "hybrid_rope", "hybrid_options")


def config_of(name: str) -> dict[str, Any]:
    """Return a checkpoint's configuration."""
    configs: dict[str, Any] = json.loads((HYBRIDS / "hybrids.json").read_text(encoding="utf-8"))["configs"]
    return configs[name]


def arrays_of(name: str) -> dict[str, Tensor]:
    """Return a checkpoint's parameters, and what the published implementation made of them."""
    with np.load(HYBRIDS / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def write_checkpoint(folder: Path, name: str) -> Path:
    """Write a checkpoint's folder as the published implementation does."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value for key, value in arrays_of(name).items() if key.startswith(PARAMETERS)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_of(name)), encoding="utf-8")
    return folder


def models_package(folder: Path) -> ModuleType:
    """Return a package that runs the checkpoints, which were made on a CPU: the whole gradient is clipped."""
    built = build_package("models", [make_variant(heads=HEADS, clip="total")], SCHEDULES["one_level_atomic"])
    return import_package(folder / "models", built, f"m2gen_test_{folder.name}_models")


def hf_of(package: ModuleType) -> Any:
    """Return a package's module for transformers, which Auto classes know only of after its ``register``."""
    with kept_registries():
        return importlib.import_module(f"{package.__name__}.hf")


def small_config(kind: str) -> dict[str, Any]:
    """Return the configuration of a small model: a recorded one, one without attention, or one of bare mixers."""
    if kind in MODEL_NAMES:
        return config_of(kind)
    config = config_of("hybrid_nope")
    mixer = config["sequence_mixer_blocks"][0]
    bare = {"kernel_size": None, "activation_function": None, "use_residual": False, "num_f_heads": 1}
    first = mixer if kind == "recurrent" else {**mixer, **bare, "normalization_function": "layernorm"}
    return {**config, "sequence_mixer_blocks": [first, dict(mixer)]}


def small_model(hf: Any, kind: str, backend: str = "reference", **options: Any) -> Any:
    """Return a model that was not trained, whose greedy tokens vary."""
    torch.manual_seed(0)
    config = hf.M2RNNConfig(**{**small_config(kind), "backend": backend, "eos_token_id": None, **options})
    return hf.M2RNNForCausalLM(config).eval()
