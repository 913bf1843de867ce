"""One step of training: eager, or replayed from a CUDA graph of its length, which takes the host no time."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from decoder import groups_of
from torch import Tensor, nn
from torch.nn import functional as F
from words import Group, products

WARM = 2
"""Eager steps of each length before its capture: kernels are compiled, and the optimizer's state is made, in them."""


@dataclass(frozen=True)
class Recipe:
    """How every model is trained; a step has ``batch`` words, or fewer where they are long, of ``tokens`` together."""

    batch: int
    tokens: int
    learning_rate: float
    weight_decay: float
    clip: float
    graphs: bool


@dataclass
class Words:
    """The words of one length that the next step trains on, and what captures of it write; always at one place."""

    letters: Tensor
    uses: int = 0
    graph: torch.cuda.CUDAGraph | None = None


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return a context whose work goes to a stream that can be captured, as the default one cannot be."""
    if device.type != "cuda":
        return nullcontext()
    torch.cuda.synchronize(device)
    return torch.cuda.stream(torch.cuda.Stream(device))


class Stepper:
    """Trains a model one step at a time; ``loss`` and ``accuracy`` are the last step's, on the device."""

    def __init__(self, model: nn.Module, problem: Group, recipe: Recipe, generator: torch.Generator) -> None:
        self.model, self.problem, self.recipe, self.generator = model, problem, recipe, generator
        device = problem.table.device
        self.graphs = recipe.graphs and device.type == "cuda"
        self.rate, self.loss, self.accuracy = torch.zeros(3, device=device).unbind()
        self.optimizer = torch.optim.AdamW(
            groups_of(model, recipe.weight_decay),
            lr=self.rate,  # a tensor, since a replay reads what is there then
            betas=(0.9, 0.99),
            fused=device.type == "cuda",
            capturable=self.graphs,
        )
        self.words: dict[int, Words] = {}

    def step(self, length: int, rate: float) -> None:
        """Train on fresh words of a length, at a part of the learning rate."""
        if length not in self.words:
            batch = max(1, min(self.recipe.batch, self.recipe.tokens // length))
            letters = torch.empty(batch, length, dtype=torch.long, device=self.rate.device)
            self.words[length] = Words(letters)
        words = self.words[length]
        self.rate.fill_(rate * self.recipe.learning_rate)
        words.letters.random_(self.problem.order, generator=self.generator)
        if self.graphs and words.graph is None and words.uses >= WARM:
            self._capture(words)
        if words.graph is None:
            self._train(words.letters)
        else:
            words.graph.replay()
        words.uses += 1

    def _train(self, letters: Tensor) -> None:
        """Do one step on the words in ``letters``: what runs eagerly, and what is captured."""
        answers = products(letters, self.problem.table)
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(letters)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), answers.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.loss.copy_(loss.detach())
        self.accuracy.copy_((logits.detach().argmax(-1) == answers).float().mean())

    def _capture(self, words: Words) -> None:
        """Record ``_train`` of these words on the stream that the eager steps ran on; nothing is trained by this."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self._train(words.letters)
        except RuntimeError as error:
            self.graphs = False
            reason = str(error).splitlines()[0]
            print(f"steps are eager from here, since one could not be captured: {reason}", file=sys.stderr)
        else:
            words.graph = graph
