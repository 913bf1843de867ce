"""The training loop with its checkpoint, and the figures of losses."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import data
import torch
from files import store
from model import Config, Trainer
from torch import Tensor


def device_at_hand() -> torch.device:
    """Return the GPU that torch can use, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def facts_of(config: Config) -> dict[str, Any]:
    """Return a config as JSON and YAML hold it."""
    return dict(json.loads(json.dumps(asdict(config))))


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Have the same bits computed every time, within the context."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def steps(trainer: Trainer, text: Tensor, until: int) -> Iterator[Tensor]:
    """Train up to step ``until``; yield each step's loss."""
    config = trainer.config
    with determinism(config.deterministic):
        while trainer.done < until:
            yield trainer.step(*data.batch(text, config.batch, config.seq, config.seed, trainer.done))


def train(config: Config, out: Path, until: int | None = None) -> list[float]:
    """Train up to the config's last step, or as if interrupted after ``until``; return the losses.

    Goes on from the checkpoint where there is one. One of another config or another text ends the program.
    """
    trainer, losses, text = Trainer(config, device_at_hand()), [], data.read(config.text)
    place, facts = out / "checkpoint.pt", {**facts_of(config), "sha256_of_text": data.digest_of(text)}
    if place.is_file():
        saved = torch.load(place, map_location=trainer.device, weights_only=True)
        changed = [key for key in facts if facts[key] != saved["config"].get(key) and key != "save_every"]
        if changed:
            raise SystemExit(
                f"{place} must be of this config, but has another {', '.join(changed)}; choose another --out"
            )
        trainer.restore(saved["trainer"])
        losses = saved["losses"]
        print(f"going on at step {trainer.done} from {place}", file=sys.stderr)
    recent: list[Tensor] = []
    began, before = time.perf_counter(), trainer.done
    for loss in steps(trainer, text, config.steps if until is None else until):
        recent.append(loss)
        if trainer.done % config.save_every == 0 or trainer.done == config.steps:
            losses += torch.stack(recent).tolist()
            recent = []
            saved = {"config": facts, "trainer": trainer.state(), "losses": losses}
            store(place, lambda path, saved=saved: torch.save(saved, path))
            rate = (trainer.done - before) * config.batch * config.seq / (time.perf_counter() - began)
            print(f"step {trainer.done}: loss {losses[-1]:.4f}, {rate:,.0f} tokens/s", file=sys.stderr)
    return losses + [loss.item() for loss in recent]


def draw(curves: dict[str, tuple[list[float], str]], place: Path) -> None:
    """Draw losses, each curve with its name and style, where matplotlib is at hand."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is missing (pip install -e '.[examples]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for name, (losses, style) in curves.items():
        axes.plot(range(1, len(losses) + 1), losses, style, linewidth=1, label=name)
    axes.set(xlabel="step", ylabel="loss (nats a byte)")
    if len(curves) > 1:
        axes.legend()
    figure.tight_layout()
    figure.savefig(place, dpi=120)
    pyplot.close(figure)
