"""A plain loop: parameter groups, mixed precision, compile, packed batches, checkpoints.

python examples/train/plain_loop.py --package generated.h100 --out /tmp/plain
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from documents import batch_of, small_model
from torch.nn.utils import clip_grad_norm_

sys.path.append(str(Path(__file__).resolve().parents[1]))

from files import store


@dataclass(frozen=True)
class Options:
    """How steps run: ``mixed`` computes in bfloat16, from parameters in float32; ``compiled`` as one graph.

    A checkpoint is written every ``save_every`` steps, and after the last one.
    """

    learning_rate: float = 1e-3
    mixed: bool = False
    compiled: bool = False
    save_every: int = 50


def train(model: Any, package: str, out: Path, steps: int, options: Options) -> list[float]:
    """Train up to ``steps``, from the checkpoint in ``out`` where there is one, and return the losses of this run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    groups = importlib.import_module(package).parameter_groups(model, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, options.learning_rate)
    step = torch.compile(model, fullgraph=True) if options.compiled else model
    out.mkdir(parents=True, exist_ok=True)
    place, done = out / "checkpoint.pt", 0
    if place.exists():
        saved = torch.load(place, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
    losses = []
    for number in range(done, steps):
        batch = {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch_of(number).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=options.mixed):
            loss = step(**batch).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())  # .item() here would wait for the device in every step
        if (number + 1) % options.save_every == 0 or number + 1 == steps:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": number + 1}
            store(place, partial(torch.save, saved))  # whole or not at all: the one before stays until then
    return torch.stack(losses).tolist() if losses else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", default="generated.h100")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    fast = Options(mixed=True, compiled=True)
    found = train(small_model(given.package), given.package, given.out, given.steps, fast)
    print(f"{len(found)} steps, last losses {found[-3:]}")
