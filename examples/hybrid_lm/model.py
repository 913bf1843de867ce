"""What config.yaml says, the model that it describes, and one step of its training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from data import TOKENS
from decoder import UNCOMPILED, Decoder, groups_of, mixer, package_of
from settings import check, merged, readable
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Bench:
    """What the benchmark measures: batches of ``tokens`` tokens at several lengths."""

    lengths: tuple[int, ...]
    tokens: int
    steps: int
    compile: bool | str


@dataclass(frozen=True)
class Compare:
    """What the comparison of backends trains: the first ``steps`` steps of some seeds, on sequences of ``seq``."""

    seeds: tuple[int, ...]
    seq: int
    steps: int


@dataclass(frozen=True)
class Config:
    """What config.yaml says."""

    package: str
    layer: str
    backend: str
    mixers: tuple[str, ...]
    width: int
    heads: int
    dtype: str
    compile: bool | str
    deterministic: bool
    seq: int
    batch: int
    steps: int
    warmup: int
    learning_rate: float
    weight_decay: float
    seed: int
    save_every: int
    text: tuple[str, ...]
    compare: Compare
    bench: Bench


def load(path: Path, changes: dict[str, Any]) -> Config:
    """Read a config file and change some of its values; what is missing, unknown or of no sense ends the program."""
    values = _with_tuples(merged(path, changes, {field.name for field in fields(Config)}))
    if values["dtype"] not in ("bf16", "fp32"):
        raise SystemExit(f"dtype must be bf16 or fp32, got {values['dtype']!r}")
    with readable(path):
        compare, bench = Compare(**_with_tuples(values["compare"])), Bench(**_with_tuples(values["bench"]))
    for compiled in (values["compile"], bench.compile):
        if compiled not in (True, False, "blocks"):
            raise SystemExit(f"compile must be true, false or blocks, got {compiled!r}")
    config = replace(Config(**values), compare=compare, bench=bench)
    check(path, config, free=("seed", "seeds", "warmup"), empty=("text",))
    return config


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()}


def decoder_of(config: Config) -> Decoder:
    """Return the model of a config."""
    package, sizes = package_of(config.package), (config.width, config.heads)
    mixers = [mixer(kind, *sizes, package, config.layer, backend=config.backend) for kind in config.mixers]
    return Decoder(mixers, config.width, TOKENS, TOKENS)


class Trainer:
    """A model, its optimizer and its step; two trainers of one config and state do the same.

    ``make`` makes the model of the config, after the seed was set.
    """

    def __init__(self, config: Config, device: torch.device, make: Callable[[Config], Decoder] | None = None) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        self.model = (make or decoder_of)(config).to(device)
        self.called = self._compiled()
        self.optimizer = torch.optim.AdamW(
            groups_of(self.model, config.weight_decay),
            betas=(0.9, 0.95),
            fused=device.type == "cuda",
            **self.optimizer_options(),
        )
        self.done = 0

    def optimizer_options(self) -> dict[str, Any]:
        """Return what the optimizer is told of its learning rate."""
        return {"lr": self.config.learning_rate}

    def _compiled(self) -> Callable[[Tensor], Tensor]:
        """Return the model as steps call it; blocks of one kind share what is compiled of one of them."""
        options = {"fullgraph": not set(UNCOMPILED) & set(self.config.mixers), "dynamic": False}
        if self.config.compile == "blocks":
            for block in self.model.blocks:
                block.compile(**options)
            return self.model
        return torch.compile(self.model, **options) if self.config.compile else self.model

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context of the forward."""
        if self.config.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def step(self, tokens: Tensor, following: Tensor) -> Tensor:
        """Train on one batch and return its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.rate()
        loss = self.train(tokens.to(self.device), following.to(self.device))
        self.done += 1
        return loss

    def train(self, tokens: Tensor, following: Tensor) -> Tensor:
        """Do what a step does on the device, and return its loss."""
        with self.autocast():
            logits = self.called(tokens)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), following.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def judged(self, tokens: Tensor, following: Tensor) -> Tensor:
        """Return the sum of the losses of a batch, in nats."""
        with self.autocast():
            logits = self.called(tokens.to(self.device))
        return F.cross_entropy(logits.flatten(0, 1).float(), following.to(self.device).flatten(), reduction="sum")

    def rate(self) -> float:
        """Return the part of the learning rate at this step: a linear rise, and half a cosine down to a tenth."""
        config = self.config
        if self.done < config.warmup:
            return (self.done + 1) / config.warmup
        part = (self.done - config.warmup) / max(1, config.steps - config.warmup)
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, part))

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "done": self.done}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]
