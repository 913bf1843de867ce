"""Run by ``test_pages`` on four ranks: the snippets of a page that split a layer over them.

The folder has the snippets in ``blocks.json``; the folder that has ``generated`` is the working directory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from ranks import serve
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

Names = dict[str, Any]
WIDTH, EACH = 32, 4
"""Width of the model, and tokens that a rank has of each sequence."""
TOKENS = (512, 512, 300, 0)
"""Tokens that each rank has of the packed batch on the page."""


def mixer() -> nn.Module:
    """Return a layer on the eager reference."""
    from generated.h100 import M2RNN

    torch.manual_seed(0)
    layer: nn.Module = M2RNN.from_variant("m2rnn_7b", hidden_size=WIDTH, backend="reference")
    return layer


class Block(nn.Module):
    """A layer of a model: its mixer, and the sum around it."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = mixer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x and what the mixer makes of it."""
        out: torch.Tensor = x + self.mixer(x)
        return out


def by_a_plan(text: str) -> None:
    """The plan's styles take a model's layers, under FSDP, and the model runs on a rank's part of the tokens."""
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", "cp", "tp"))
    mesh["dp", "cp"]._flatten("dp_cp")
    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    exec(text, {"model": model, "mesh": mesh})
    x = torch.randn(1, EACH, WIDTH)
    y = model.layers[0](x)
    assert y.shape == x.shape
    assert y.isfinite().all()


def by_functions(text: str) -> None:
    """The functions take a rank's tokens, and return as many."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    names: Names = {"mixer": mixer(), "mesh": init_device_mesh("cpu", (ranks,)), "group": distributed.group.WORLD}
    names |= {"my_tokens": torch.randn(TOKENS[rank], WIDTH), "x": torch.randn(ranks, EACH, WIDTH)}
    names["cu_seqlens"] = torch.tensor([0, 700, sum(TOKENS)], dtype=torch.int32)
    exec(text, names)
    assert names["y"].shape == names["x"].shape
    assert names["sharded"](torch.randn(1, EACH, WIDTH)).shape == (1, EACH, WIDTH)


def prepare(folder: Path) -> list[str]:
    """Return the snippets."""
    sys.path.insert(0, "")
    found: list[str] = json.loads((folder / "blocks.json").read_text(encoding="utf-8"))
    return found


CHECKS = {"plan": lambda blocks: by_a_plan(blocks[0]), "functions": lambda blocks: by_functions(blocks[1])}

if __name__ == "__main__":
    serve(CHECKS, prepare)
