"""What the snippets of this folder share: a small model, documents to train on, and batches without padding."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
TOKENS = 256


def small_model(package: str, backend: str = "kernels", **sizes: Any) -> Any:
    """Return a model of bytes; ``sizes`` are of ``M2RNNConfig``, whose mixers the package must hold for kernels."""
    hf = importlib.import_module(f"{package}.hf")
    torch.manual_seed(0)
    return hf.M2RNNForCausalLM(hf.M2RNNConfig(**{"vocab_size": TOKENS, **sizes}, backend=backend))


def documents(length: int = 64) -> list[dict[str, Tensor]]:
    """Return the paragraphs of the repository's licence, up to ``length`` bytes of each."""
    paragraphs = LICENSE.read_bytes().split(b"\n\n")
    rows = [torch.tensor(list(text[:length])) for text in paragraphs if len(text) > 1]
    return [{"input_ids": row, "labels": row} for row in rows]


class Packed(DataCollatorWithFlattening):
    """Lay documents one after the other, as transformers does, with a copy of the offsets that stays on the host."""

    def __init__(self) -> None:
        super().__init__(return_flash_attn_kwargs=True)

    def __call__(self, features: list[dict[str, Tensor]], *rest: Any, **options: Any) -> dict[str, Any]:
        """Return input_ids, labels and position_ids (1, T), and the offsets of the documents."""
        lists = [{name: row.tolist() for name, row in feature.items()} for feature in features]
        batch: dict[str, Any] = super().__call__(lists, *rest, **options)
        batch["cu_seqlens_cpu"] = batch["cu_seq_lens_q"].numpy()  # an array, which no trainer moves to the device
        return batch


def batch_of(number: int, size: int = 4) -> dict[str, Any]:
    """Return the batch of a step, by its number: a run that goes on sees what one in a piece would."""
    texts = documents()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(number))
    return Packed()([texts[i] for i in order[:size].tolist()])
