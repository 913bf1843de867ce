"""One run: a mixer, a task and a seed, trained on words of at most 1,024 letters and asked about longer ones."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from decoder import Attention, Decoder, groups_of, layer_of, rotated
from gated_delta import GatedDelta
from settings import check, merged, readable
from tasks import Task
from torch import Tensor, nn
from torch.nn import functional as F

WARM = 2
"""Eager steps of each length before its capture."""


@dataclass(frozen=True)
class Evaluation:
    """How many words of which lengths a trained model is asked about, at most ``tokens`` letters at once."""

    lengths: tuple[int, ...]
    words: int
    tokens: int


@dataclass(frozen=True)
class Config:
    """What config.yaml says."""

    package: str
    layer: str
    backend: str
    tasks: tuple[str, ...]
    models: tuple[str, ...]
    seeds: tuple[int, ...]
    width: int
    layers: int
    heads: int
    rows: int
    window: int
    items: int
    keys: int
    values: int
    noise: int
    lengths: tuple[int, ...]
    tokens: int
    steps: int
    warm: int
    learning_rate: float
    weight_decay: float
    clip: float
    dtype: str
    graphs: bool
    evaluate: Evaluation

    def task(self, name: str) -> Task:
        """Return a task of these sizes."""
        return Task(name, self.items, self.keys, self.values, self.noise)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: up, and then down to a twentieth along a line."""
        return self.learning_rate * min((step + 1) / self.warm, max(0.05, 1 - step / self.steps))


def load(path: Path, changes: dict[str, Any]) -> Config:
    """Read a config file and change some of its values; what is missing, unknown or of no sense ends the program."""
    values = merged(path, changes, {field.name for field in fields(Config)})
    with readable(path):
        config = config_of(values)
    check(path, config, free=("seeds",))
    if config.dtype not in ("bf16", "fp32"):
        raise SystemExit(f"dtype must be bf16 or fp32, got {config.dtype!r}")
    return config


def config_of(found: dict[str, Any]) -> Config:
    """Return the config whose values YAML or JSON has."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    asked = {k: tuple(v) if isinstance(v, list) else v for k, v in values["evaluate"].items()}
    return replace(Config(**values), evaluate=Evaluation(**asked))


@dataclass(frozen=True)
class Outcome:
    """What a run gave; ``accuracy`` has the share of right answers by length, ``numbers`` what a layer remembers by."""

    task: str
    model: str
    seed: int
    parameters: int
    numbers: int | None
    seconds: float
    losses: list[float]
    accuracy: dict[str, float]


class Window(Attention):
    """Attention to the last ``window`` letters alone, so that its cache is no larger than that."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__(width, heads)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        size, length = self.window, x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        ready = (F.pad(part, (0, 0, 0, -length % size)) for part in (rotated(q), rotated(k), v))
        q, k, v = (part.unflatten(-2, (-1, size)) for part in ready)
        k, v = (torch.cat((F.pad(part, (0, 0, 0, 0, 1, 0))[..., :-1, :, :], part), -2) for part in (k, v))
        back = torch.arange(size, device=x.device)[:, None] + size - torch.arange(2 * size, device=x.device)
        seen = ((back >= 0) & (back < size)).expand(q.shape[-3], size, 2 * size).clone()
        seen[0, :, :size] = False  # nothing is before the first block
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).flatten(2, 3)[:, :, :length]
        return self.out(y.transpose(1, 2).flatten(-2))


def mixer(config: Config, kind: str, package: ModuleType) -> nn.Module:
    """Return a mixer of a kind."""
    if kind == "m2rnn":
        return layer_of(package, config.layer, config.width, backend=config.backend)
    if kind == "gated_deltanet":
        return GatedDelta(config.width, config.heads, config.rows, config.rows)
    if kind == "window":
        return Window(config.width, config.heads, config.window)
    if kind == "attention":
        return Attention(config.width, config.heads)
    raise SystemExit(f"models must be of m2rnn, gated_deltanet, window, attention, got {kind!r}")


def numbers_of(part: nn.Module, width: int) -> int | None:
    """Return how many numbers a mixer carries from letter to letter, beside a convolution's last inputs; None: all."""
    if isinstance(part, GatedDelta):
        return part.state_size
    if isinstance(part, Window):
        return 2 * width * part.window
    if isinstance(part, Attention):
        return None
    return part.total_heads * part.state_expansion * part.head_dim


class Trainer:
    """Trains a model a step at a time, which on a GPU is replayed from a CUDA graph of its length."""

    def __init__(self, config: Config, model: nn.Module, task: Task, generator: torch.Generator) -> None:
        self.config, self.model, self.task, self.generator = config, model, task, generator
        device = generator.device
        self.graphs = config.graphs and device.type == "cuda"
        self.rate, self.loss = torch.zeros(2, device=device).unbind()
        self.optimizer = torch.optim.AdamW(
            groups_of(model, config.weight_decay), lr=self.rate, betas=(0.9, 0.95), fused=device.type == "cuda",
            capturable=self.graphs,
        )  # fmt: skip
        self.batches: dict[int, tuple[Tensor, Tensor]] = {}
        self.captured: dict[int, torch.cuda.CUDAGraph] = {}
        self.uses: dict[int, int] = {}

    def step(self, length: int, rate: float) -> None:
        """Train on fresh words of a length."""
        self.rate.fill_(rate)
        drawn = self.task.draw(max(1, self.config.tokens // length), length, self.generator)
        if length not in self.batches:
            self.batches[length] = drawn[0].clone(), drawn[1].clone()
        for place, new in zip(self.batches[length], drawn, strict=True):
            place.copy_(new)
        self.uses[length] = self.uses.get(length, 0) + 1
        if self.graphs and self.uses[length] > WARM and length not in self.captured:
            self.captured[length] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.captured[length], stream=torch.cuda.current_stream()):
                self._train(*self.batches[length])
        if length in self.captured:
            self.captured[length].replay()
        else:
            self._train(*self.batches[length])

    def _train(self, letters: Tensor, answers: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        logits = asked(self.model, letters, answers.shape[1], self.config.dtype)
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.loss.copy_(loss.detach())


def asked(model: nn.Module, letters: Tensor, items: int, dtype: str) -> Tensor:
    """Return logits of the last ``items`` letters, in float32."""
    with torch.autocast(letters.device.type, torch.bfloat16, enabled=dtype == "bf16", cache_enabled=False):
        return model(letters)[:, -items:].float()


def train(config: Config, name: str, kind: str, seed: int, package: ModuleType, device: torch.device) -> Outcome:
    """Train one model and judge it."""
    began, task = time.perf_counter(), config.task(name)
    torch.manual_seed(seed)
    mixers = [mixer(config, kind, package) for _ in range(config.layers)]
    model = Decoder(mixers, config.width, task.letters, config.values).to(device)
    trainer = Trainer(config, model, task, torch.Generator(device).manual_seed(1000 + seed))
    lengths, losses = random.Random(seed), list[float]()
    for step in range(config.steps):
        trainer.step(lengths.choice(config.lengths), config.rate(step))
        if (step + 1) % 100 == 0 or step + 1 == config.steps:
            losses.append(round(trainer.loss.item(), 5))
    accuracy = {str(length): judge(config, model, task, length, device) for length in config.evaluate.lengths}
    size = sum(p.numel() for p in model.parameters())
    seconds = time.perf_counter() - began
    return Outcome(name, kind, seed, size, numbers_of(mixers[0], config.width), seconds, losses, accuracy)


@torch.no_grad()
def judge(config: Config, model: nn.Module, task: Task, length: int, device: torch.device) -> float:
    """Return the share of right answers to words of a length, which are the same for every model."""
    generator = torch.Generator(device).manual_seed(987654321)
    right, left = 0, config.evaluate.words
    while left:
        count = min(left, max(1, config.evaluate.tokens // length))
        letters, answers = task.draw(count, length, generator)
        right += int((asked(model, letters, task.items, config.dtype).argmax(-1) == answers).sum())
        left -= count
    return right / (config.evaluate.words * task.items)
