"""One run: a model, a group and a seed, trained on short words and judged at every position of long ones."""

from __future__ import annotations

import math
import random
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from decoder import KINDS, Decoder, mixer
from settings import merged, readable
from step import Recipe, Stepper, own_stream
from torch import Tensor, nn
from words import Group, elements_of, group

READ_EVERY = 10
"""Steps between looks at the accuracy, each of which waits for the GPU."""
KNOWN, SETTLED = 0.97, 0.999
"""Accuracy at the longest words so far at which longer ones come, and at the longest of all at which a run settles."""


@dataclass(frozen=True)
class Evaluation:
    """The words that a trained model is asked about."""

    length: int
    words: int
    at_once: int


@dataclass(frozen=True)
class Config:
    """What config.yaml says."""

    package: str
    layer: str
    backend: str
    groups: tuple[str, ...]
    models: tuple[str, ...]
    seeds: tuple[int, ...]
    width: int
    layers: int
    heads: int
    lengths: tuple[int, ...]
    steps: int
    settle: int
    batch: int
    tokens: int
    learning_rate: float
    weight_decay: float
    clip: float
    graphs: bool
    forget: float | None
    orthogonal: bool
    conv_width: int | None
    scale: float
    evaluate: Evaluation
    budget: float

    @property
    def recipe(self) -> Recipe:
        """What a step of training asks for."""
        return Recipe(self.batch, self.tokens, self.learning_rate, self.weight_decay, self.clip, self.graphs)


def load(path: Path, changes: dict[str, Any]) -> Config:
    """Read a config file and change some of its values; what is missing, unknown or of no sense ends the program."""
    found = merged(path, changes, {field.name for field in fields(Config)})
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    with readable(path):
        config = replace(Config(**values), evaluate=Evaluation(**values["evaluate"]))
        check(config)
    return config


def check(config: Config) -> None:
    """Raise ValueError for what a run would fail with, maybe after hours of others; a group that is none ends it."""
    for name in config.groups:
        elements_of(name)
    if unknown := [kind for kind in config.models if kind not in KINDS]:
        raise ValueError(f"models must be of {', '.join(KINDS)}, got {', '.join(map(str, unknown))}")
    sizes = {name: getattr(config, name) for name in ("width", "layers", "heads", "steps", "batch", "tokens")}
    sizes |= asdict(config.evaluate) | {f"length {n}": length for n, length in enumerate(config.lengths)}
    sizes |= {"groups": len(config.groups), "lengths": len(config.lengths)}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if "attention" in config.models and config.width % (2 * config.heads):
        raise ValueError(f"width must be a multiple of {2 * config.heads} for {config.heads} heads, got {config.width}")
    if config.forget is not None and not 0 < config.forget < 1:
        raise ValueError(f"forget must be between 0 and 1, or null, got {config.forget}")


@dataclass(frozen=True)
class Outcome:
    """What a run gave; ``errors`` counts the wrong answers at each position, over ``words`` words.

    ``known_at`` has the step at which each length was known, for as many as were.
    """

    group: str
    model: str
    seed: int
    steps: int
    trained_to: int
    known_at: list[int]
    seconds: float
    losses: list[float]
    words: int
    errors: list[int]

    def accuracy(self, start: int, end: int) -> float:
        """Share of right answers at positions from ``start`` up to ``end``."""
        part = self.errors[start:end]
        return 1 - sum(part) / (self.words * max(len(part), 1))

    @property
    def perfect_to(self) -> int:
        """Positions before the first wrong answer to any word."""
        return next((i for i, wrong in enumerate(self.errors) if wrong), len(self.errors))


def make_model(config: Config, kind: str, problem: Group, package: ModuleType) -> Decoder:
    """Return an untrained model; kinds differ in nothing but the mixer."""
    options = {"backend": config.backend, "conv_width": config.conv_width}
    mixers = [mixer(kind, config.width, config.heads, package, config.layer, **options) for _ in range(config.layers)]
    for part in (part for one in mixers for part in one.modules()):
        begin(part, config)
    return Decoder(mixers, config.width, problem.order, problem.order)


@torch.no_grad()
def begin(part: nn.Module, config: Config) -> None:
    """Change what a layer of the recurrence begins with, where the config says so."""
    if hasattr(part, "dt_bias") and config.forget is not None:
        part.A_log.zero_()
        part.dt_bias.fill_(math.log(math.expm1(-math.log(config.forget))))
    if hasattr(part, "state_weight") and config.orthogonal:
        for weight in part.state_weight:
            nn.init.orthogonal_(weight)
    if getattr(part, "conv1d", None) is not None and config.conv_width == 1:
        part.conv1d.weight.fill_(config.scale)  # no convolution


class Curriculum:
    """The lengths to train on: the last so far more than half of the time, and those before."""

    def __init__(self, config: Config, seed: int) -> None:
        self.lengths = config.lengths
        self.known_at: list[int] = []
        self.random = random.Random(seed)

    @property
    def finished(self) -> bool:
        """Whether the last length has been known once; what remains is to settle."""
        return len(self.known_at) == len(self.lengths)

    @property
    def index(self) -> int:
        """Index of the last length so far."""
        return min(len(self.known_at), len(self.lengths) - 1)

    @property
    def longest(self) -> int:
        """The last length so far."""
        return self.lengths[self.index]

    @property
    def caution(self) -> float:
        """The part of the learning rate that is left at these lengths: gradients of longer words vary more."""
        return math.sqrt(min(1.0, self.lengths[0] / self.longest))

    def draw(self) -> int:
        """Return the length of the next step's words."""
        last = self.random.random() < 0.6
        return self.lengths[self.index if last else self.random.randint(0, self.index)]

    def see(self, step: int, accuracies: list[float]) -> None:
        """Take the accuracies of the last steps of this length; go on to the next if it is known."""
        wanted = SETTLED if self.index + 1 == len(self.lengths) else KNOWN
        if accuracies and sum(accuracies) / len(accuracies) >= wanted:
            self.known_at.append(step)


def train(config: Config, kind: str, name: str, seed: int, package: ModuleType, device: torch.device) -> Outcome:
    """Train one model and judge it."""
    began = time.perf_counter()
    with own_stream(device):
        problem = group(name).to(device)
        torch.manual_seed(seed)
        model = make_model(config, kind, problem, package).to(device)
        stepper = Stepper(model, problem, config.recipe, torch.Generator(device).manual_seed(1000 + seed))
        curriculum, losses = Curriculum(config, seed), list[float]()
        step = fit(stepper, curriculum, config, losses)
        errors = judge(model, problem, config.evaluate, device)
    seconds, words = time.perf_counter() - began, config.evaluate.words
    reached, known_at = curriculum.longest, curriculum.known_at
    return Outcome(name, kind, seed, step, reached, known_at, seconds, losses, words, errors)


def fit(stepper: Stepper, curriculum: Curriculum, config: Config, losses: list[float]) -> int:
    """Train until every length is known and ``settle`` more steps, or for all steps; return how many were done."""
    seen: list[Tensor] = []
    step, end = 0, config.steps
    while step < end:
        length = curriculum.draw()
        stepper.step(length, rate(step, end, config) * curriculum.caution)
        step += 1
        if length == curriculum.longest:
            seen.append(stepper.accuracy.clone())
        if step % READ_EVERY == 0 or step == end:
            losses.append(round(stepper.loss.item(), 5))
            if not curriculum.finished:
                curriculum.see(step, torch.stack(seen).tolist() if seen else [])
                end = min(end, step + config.settle) if curriculum.finished else end
            seen = []
    return step


def rate(step: int, end: int, config: Config) -> float:
    """Return the part of the learning rate at a step: up over 50 steps, level, and down over the last ``settle``."""
    return min(1.0, (step + 1) / 50, max(0.02, (end - step) / max(1, config.settle)))


@torch.no_grad()
def judge(model: Decoder, problem: Group, asked: Evaluation, device: torch.device) -> list[int]:
    """Return how many of the words are answered wrong at each position; the words are the same for every model."""
    generator = torch.Generator(device).manual_seed(987654321)
    wrong = torch.zeros(asked.length, dtype=torch.long, device=device)
    for first in range(0, asked.words, asked.at_once):
        count = min(asked.at_once, asked.words - first)
        letters, answers = problem.words(count, asked.length, generator)
        wrong += (model(letters).argmax(-1) != answers).sum(0)
    return [int(x) for x in wrong.tolist()]
