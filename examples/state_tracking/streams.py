"""Training on words without end: each goes on from the state that the model has come to, until the model errs."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tracker import Tracker
from words import Answers, alphabet

READ_EVERY = 10
"""Steps between looks at the accuracy, which wait for the GPU."""
WARM = 3
"""Eager steps before a step is captured: kernels are compiled, and the optimizer's state is made, in them."""
SAY_EVERY = 15.0
"""Seconds between lines on the way."""


@dataclass(frozen=True)
class Plan:
    """How a layer is trained."""

    letters: tuple[int, ...]
    """How many letters there are, from stage to stage; 0: all."""
    known: float
    """Share of right answers with which the next letters come."""
    settled: float
    """Share of right answers to all letters with which the learning rate begins to fall."""
    settle: int
    """Steps over which it falls to nearly nothing."""
    steps: int
    """Steps after which it begins to fall at the latest."""
    streams: int
    segment: int
    """Letters of every stream in a step; gradients go no further back."""
    sure: float
    """Probability of a right answer below which a stream ends; 0: streams end only at random."""
    restart: float
    """Probability that a stream ends in a step, whatever was answered."""
    learning_rate: float
    weight_decay: float
    decay_inputs: bool
    """Whether weight decay is for input projections, too, and not for state weights and output projections alone."""
    noise: float
    """Standard deviation of what is added to every gradient."""
    clip: float


class Streams:
    """Trains a tracker a step at a time; ``accuracy`` and ``loss`` are the last step's, on the device.

    A stream is a word that goes on from step to step, with the state that the model has come to on it. Where the model
    no longer knows its product, another begins in its place: so words are as long as the model can follow them.
    """

    def __init__(self, model: Tracker, said: Answers, plan: Plan, seed: int) -> None:
        self.model, self.said, self.plan, self.problem = model, said, plan, said.problem
        self.device = said.problem.table.device
        self.cuda = self.device.type == "cuda"
        self.state = model.first(plan.streams)
        self.product = torch.zeros(plan.streams, dtype=torch.long, device=self.device)
        self.lost = torch.ones(plan.streams, dtype=torch.bool, device=self.device)
        self.ages = torch.zeros(plan.streams, device=self.device)
        self.alphabet = alphabet(self.problem, seed).to(self.device)
        self.rate, self.letters, self.accuracy, self.loss = torch.zeros(4, device=self.device).unbind()
        decayed, rest = model.decayed(plan.decay_inputs)
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=self.rate,  # a tensor, since a replay reads what is there then
            betas=(0.9, 0.99),
            capturable=self.cuda,
            fused=self.cuda,
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done = 0

    def step(self, rate: float, letters: int) -> None:
        """Train on the next letters of every stream, of ``letters`` or (0) all."""
        self.rate.fill_(rate)
        self.letters.fill_(min(letters, self.problem.order) or self.problem.order)
        if self.cuda and self.done == WARM:
            self._capture()
        if self.graph is None:
            self._train()
        else:
            self.graph.replay()
        self.done += 1

    def _capture(self) -> None:
        """Record ``_train`` on the stream that the eager steps ran on; nothing is trained by this."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self._train()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            print(f"steps are eager, since one could not be captured: {reason}", file=sys.stderr)
        else:
            self.graph = graph

    def _train(self) -> None:
        """Do one step: what runs eagerly, and what is captured."""
        letters, answers = self._draw()
        self.optimizer.zero_grad(set_to_none=True)
        logits, after = self.model(letters, self.state.clone())
        losses = self.said.losses(logits.float(), answers)
        loss = losses.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip)
        self.optimizer.step()
        self.state.copy_(after.detach())
        if self.plan.sure:
            self.lost.copy_((losses.detach() > -math.log(self.plan.sure)).any(1))
        else:
            self.lost.zero_()
        self.accuracy.copy_(self.said.right(logits.detach(), answers).float().mean())
        self.loss.copy_(loss.detach())

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Begin streams anew where they end; return letters (streams, segment) of all, and the products so far."""
        plan = self.plan
        ended = self.lost | (torch.rand(plan.streams, device=self.device) < plan.restart)
        self.state.masked_fill_(ended[:, None, None, None], 0)
        self.product.masked_fill_(ended, 0)  # the identity
        self.ages.masked_fill_(ended, 0).add_(plan.segment)
        drawn = torch.rand(plan.streams, plan.segment, device=self.device) * self.letters
        letters, answers = self.alphabet[drawn.long()], list[Tensor]()
        for letter in letters.unbind(1):
            answers.append(self.problem.table[answers[-1] if answers else self.product, letter])
        self.product.copy_(answers[-1])
        return letters, torch.stack(answers, 1)


@dataclass
class Progress:
    """Where a run is: stages of letters are known in turn, and then the learning rate falls."""

    plan: Plan
    known_at: list[int]
    end: int

    @property
    def letters(self) -> int:
        """How many letters there are now; 0: all."""
        return self.plan.letters[min(len(self.known_at), len(self.plan.letters) - 1)]

    def rate(self, step: int) -> float:
        """Return the learning rate at a step: up over 50, level, and down over the last ``settle``."""
        part = min(1.0, (step + 1) / 50, max(0.02, (self.end - step) / max(1, self.plan.settle)))
        return self.plan.learning_rate * part

    def see(self, step: int, accuracy: float) -> None:
        """Take the accuracy of the last steps; go on to the next letters if these are known."""
        left = len(self.plan.letters) - len(self.known_at)
        if left and accuracy >= (self.plan.settled if left == 1 else self.plan.known):
            self.known_at.append(step)
            if left == 1:
                self.end = min(self.end, step + self.plan.settle)


def fit(streams: Streams, say: Callable[[str], None]) -> tuple[list[int], int]:
    """Train until the learning rate has fallen; return the steps at which letters were known, and their number."""
    plan = streams.plan
    progress, accuracies = Progress(plan, [], plan.steps + plan.settle), list[Tensor]()
    step, said = 0, time.monotonic()
    while step < progress.end:
        streams.step(progress.rate(step), progress.letters)
        accuracies.append(streams.accuracy.clone())
        step += 1
        if step % READ_EVERY == 0:
            accuracy, accuracies = torch.stack(accuracies).mean().item(), []
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                letters, age = progress.letters or "all", streams.ages.mean().item()
                say(f"step {step}: {letters} letters, {100 * accuracy:.2f} % right, streams of {age:.0f}")
            progress.see(step, accuracy)
    return progress.known_at, step


@torch.no_grad()
def judge(model: Tracker, said: Answers, words: int, length: int) -> list[int]:
    """Return how many words are answered wrong at each position; they are the same for every model."""
    generator = torch.Generator(said.problem.table.device).manual_seed(987654321)
    letters, answers = said.problem.words(words, length, generator)
    state, wrong = model.first(words), list[Tensor]()
    for part, right in zip(letters.split(64, 1), answers.split(64, 1), strict=True):
        logits, state = model(part, state)
        wrong.append((~said.right(logits, right)).sum(0))
    return [int(x) for x in torch.cat(wrong).tolist()]
