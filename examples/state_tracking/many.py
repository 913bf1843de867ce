"""Train a stack of models at once, each with a learning rate, a curriculum and a seed of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from stack import Stack
from step import WARM, Words
from torch import Tensor
from torch.nn import functional as F
from words import Group, alphabet, products

READ_EVERY = 10
"""Steps between looks at the accuracy, which wait for the GPU."""
KNOWN, SETTLED = 0.97, 0.999
"""Accuracy at a stage with which the next comes, and at the last at which a run settles."""
SHORT = 8
"""Length up to which words have the whole learning rate."""
BETAS, EPS = (0.9, 0.99), 1e-8


@dataclass(frozen=True)
class Plan:
    """How a model is trained: what a stack's models may differ in."""

    stages: tuple[tuple[int, int], ...]
    """Curriculum: how many letters there are, and the length of words."""
    learning_rate: float
    weight_decay: float
    clip: float
    noise: float
    steps: int
    settle: int
    caution: float
    """Power of (``SHORT`` / length) that the learning rate of longer words is multiplied by."""


@dataclass
class Progress:
    """Where a model is in its curriculum."""

    plan: Plan
    seed: int
    known_at: list[int] = field(default_factory=list)
    last: float = 0.0
    """Accuracy at the stage that it is in, when it was looked at last."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.end = self.plan.steps

    @property
    def finished(self) -> bool:
        """Whether the last stage has been known once; what remains is to settle."""
        return len(self.known_at) == len(self.plan.stages)

    @property
    def index(self) -> int:
        """Index of the stage that it is in."""
        return min(len(self.known_at), len(self.plan.stages) - 1)

    @property
    def stage(self) -> tuple[int, int]:
        """Letters and length of the stage that it is in."""
        return self.plan.stages[self.index]

    def draw(self) -> tuple[int, int]:
        """Return the next step's stage: the last so far in six of ten, else any so far."""
        often = self.random.random() < 0.6
        return self.plan.stages[self.index if often else self.random.randint(0, self.index)]

    def rate(self, step: int) -> float:
        """Return the learning rate at a step: up over 50, level, down over the last ``settle``, and nothing after."""
        plan = self.plan
        if step >= self.end:
            return 0.0
        part = min(1.0, (step + 1) / 50, max(0.02, (self.end - step) / max(1, plan.settle)))
        return plan.learning_rate * part * min(1.0, SHORT / self.stage[1]) ** plan.caution

    def see(self, step: int, accuracy: float) -> None:
        """Take the accuracy of the last steps of this stage; go on to the next if it is known."""
        self.last = accuracy
        last = self.index + 1 == len(self.plan.stages)
        if not self.finished and accuracy >= (SETTLED if last else KNOWN):
            self.known_at.append(step)
            if self.finished:
                self.end = min(self.end, step + self.plan.settle)


@dataclass(frozen=True)
class Answers:
    """What a model says: which element the product is; or, with ``points``, where it takes the first so many points.

    All points but one tell a permutation, and all but two an even one.
    """

    problem: Group
    points: int

    @property
    def classes(self) -> int:
        """How many logits that takes."""
        return self.points * self.problem.images.shape[1] if self.points else self.problem.order

    def losses(self, logits: Tensor, answers: Tensor) -> Tensor:
        """Return the cross entropy of each answer (...), of logits (..., classes)."""
        logits, wanted = self._split(logits, answers)
        losses = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none")
        return losses.view(*answers.shape, -1).sum(-1)

    def right(self, logits: Tensor, answers: Tensor) -> Tensor:
        """Return whether each answer is right, in all of its parts."""
        logits, wanted = self._split(logits, answers)
        return (logits.argmax(-1) == wanted).all(-1)

    def _split(self, logits: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        if not self.points:
            return logits[..., None, :], answers[..., None]
        return logits.unflatten(-1, (self.points, -1)), self.problem.images[answers][..., : self.points]


class Many:
    """Trains a stack a step at a time. A step's words are as long as the longest that any model draws.

    A model whose words are shorter learns from their beginning, which is a word, and from nothing behind it.
    """

    def __init__(self, stack: Stack, said: Answers, progress: Sequence[Progress], batch: int, tokens: int) -> None:
        problem = said.problem
        self.stack, self.said, self.problem, self.progress = stack, said, problem, progress
        self.batch, self.tokens, self.done = batch, tokens, 0
        device = problem.table.device
        self.cuda = device.type == "cuda"
        self.facts = torch.zeros(
            4, stack.models, device=device
        )  # learning rate, letters, length, whether they are its stage's
        self.sums = torch.zeros(2, stack.models, device=device)  # accuracies at the last stage, and how many
        self.moments = torch.zeros(2, *stack.flat.shape, device=device)
        self.count = torch.zeros((), device=device)
        plans = [one.plan for one in progress]
        self.noise = torch.tensor([plan.noise for plan in plans], device=device)[:, None]
        self.clip = torch.tensor([plan.clip for plan in plans], device=device)[:, None]
        decayed = torch.tensor(
            [
                float(value[0].dim() > 1 and "norm" not in name and not name.endswith(".D"))
                for name, value in stack.parameters.items()
                for _ in range(value[0].numel())
            ]
        )
        decay = torch.tensor([plan.weight_decay for plan in plans])[:, None]
        self.decay = (decay * decayed).to(device)
        self.noisy = any(plan.noise for plan in plans)
        self.alphabets = torch.stack([alphabet(problem, one.seed) for one in progress]).to(device)
        self.words: dict[int, Words] = {}
        self.pool: Any = None

    def round(self) -> None:
        """Train every model that has steps left, ``READ_EVERY`` steps, then look at how well each does."""
        drawn = [self._draw(self.done + i) for i in range(READ_EVERY)]
        facts = torch.tensor([fact for _, fact in drawn]).to(self.facts.device)  # one copy, since the host waits for it
        for (length, _), fact in zip(drawn, facts, strict=True):
            self.facts.copy_(fact)
            self._step(length)
        self.done += READ_EVERY
        hits, seen = self.sums.tolist()
        self.sums.zero_()
        for one, hit, count in zip(self.progress, hits, seen, strict=True):
            if count:
                one.see(self.done, hit / count)

    def _draw(self, step: int) -> tuple[int, list[list[float]]]:
        """Return the length of a step's words, and its ``facts``."""
        drawn, rates = [one.draw() for one in self.progress], [one.rate(step) for one in self.progress]
        longest = max((n for (_, n), rate in zip(drawn, rates, strict=True) if rate), default=min(n for _, n in drawn))
        letters = [float(min(count, self.problem.order) or self.problem.order) for count, _ in drawn]
        lengths = [float(min(n, longest)) for _, n in drawn]
        last = [float(rate > 0 and x == one.stage) for x, rate, one in zip(drawn, rates, self.progress, strict=True)]
        return longest, [rates, letters, lengths, last]

    def _step(self, length: int) -> None:
        if length not in self.words:
            count = max(1, min(self.batch, self.tokens // length))
            letters = torch.zeros(self.stack.models, count, length, dtype=torch.long, device=self.facts.device)
            self.words[length] = Words(letters)
        words = self.words[length]
        if self.cuda and words.graph is None and words.uses >= WARM:
            graph = torch.cuda.CUDAGraph()
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()  # of all lengths, since nothing outlives a replay
            with torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream()):
                self._train(words.letters)
            words.graph = graph
        if words.graph is None:
            self._train(words.letters)
        else:
            words.graph.replay()
        words.uses += 1

    def _train(self, letters: Tensor) -> None:
        """Do one step on fresh words, drawn into ``letters``: what runs eagerly, and what is captured."""
        count, length = letters.shape[1:]
        drawn = torch.rand(letters.shape, device=letters.device) * self.facts[1][:, None, None]
        letters.copy_(self.alphabets.gather(1, drawn.long().flatten(1)).view_as(letters))
        answers = products(letters.flatten(0, 1), self.problem.table).view_as(letters)
        parameters = list(self.stack.parameters.values())
        with torch.enable_grad():
            logits = self.stack(letters)
            losses = self.said.losses(logits, answers)
            lengths = self.facts[2][:, None]
            inside = (torch.arange(length, device=letters.device) < lengths) / (lengths * count)
            loss = (losses * inside[:, None]).sum()
        gradients = torch.autograd.grad(loss, parameters)
        self._update(torch.cat([gradient.flatten(1) for gradient in gradients], 1))
        right = self.said.right(logits.detach(), answers).float()
        self.sums[0] += (right * inside[:, None]).sum((1, 2)) * self.facts[3]
        self.sums[1] += self.facts[3]

    def _update(self, gradient: Tensor) -> None:
        """Do a step of AdamW with gradients (models, numbers), each model's clipped by its own norm."""
        norm = gradient.norm(dim=1, keepdim=True)
        gradient = gradient * (self.clip / (norm + 1e-6)).clamp(max=1)
        if self.noisy:
            gradient = gradient + torch.randn_like(gradient) * self.noise
        self.count += 1
        first, second = self.moments
        first.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient.square(), 1 - BETAS[1])
        wide = (second / (1 - BETAS[1] ** self.count)).sqrt_().add_(EPS)
        change = first / (1 - BETAS[0] ** self.count) / wide + self.decay * self.stack.flat
        self.stack.flat -= self.facts[0][:, None] * change


@torch.no_grad()
def judge(model: Callable[[Tensor], Tensor], models: int, said: Answers, asked: Mapping[str, int]) -> Tensor:
    """Return how many words each of ``models`` answers wrong at each position (models, length); all have the same.

    ``asked`` has how many ``words`` of which ``length``, and how many ``at_once``.
    """
    problem, words = said.problem, asked["words"]
    generator = torch.Generator(problem.table.device).manual_seed(987654321)
    wrong = torch.zeros(models, asked["length"], dtype=torch.long, device=problem.table.device)
    for first in range(0, words, asked["at_once"]):
        letters, answers = problem.words(min(asked["at_once"], words - first), asked["length"], generator)
        wrong += (~said.right(model(letters.expand(models, -1, -1)), answers.expand(models, -1, -1))).sum(1)
    return wrong
