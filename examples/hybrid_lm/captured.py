"""Steps of training replayed from a CUDA graph: small models, and mixers of many kernels, wait for the host."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from decoder import Decoder
from model import Config, Trainer
from torch import Tensor

WARM = 3
"""Eager steps before the capture: kernels are compiled, and the optimizer's state is made, in them."""


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return a context whose work goes to a stream that can be captured, as the default one cannot be."""
    if device.type != "cuda":
        return nullcontext()
    torch.cuda.synchronize(device)
    return torch.cuda.stream(torch.cuda.Stream(device))


class CapturedTrainer(Trainer):
    """A trainer whose steps are replays of one, on a GPU; all batches have one shape.

    Steps are eager where one cannot be captured, which is said once. It is to be used within ``own_stream``.
    """

    def __init__(self, config: Config, device: torch.device, make: Callable[[Config], Decoder] | None = None) -> None:
        self._rate = torch.zeros((), device=device)
        self._graphs, self._eager = device.type == "cuda", 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[Tensor, Tensor] | None = None
        self._loss: Tensor | None = None
        super().__init__(config, device, make)

    def optimizer_options(self) -> dict[str, Any]:
        """Return what the optimizer is told: a rate that a replay reads anew."""
        return {"lr": self._rate, "capturable": self._graphs}

    def step(self, tokens: Tensor, following: Tensor) -> Tensor:
        """Train on one batch and return its loss."""
        self._rate.fill_(self.config.learning_rate * self.rate())
        if self._batch is None:
            self._batch = torch.empty_like(tokens, device=self.device), torch.empty_like(following, device=self.device)
        for place, given in zip(self._batch, (tokens, following), strict=True):
            place.copy_(given)
        if self._graphs and self._graph is None and self._eager >= WARM:
            self._capture()
        if self._graph is None:
            self._eager += 1
            loss = self.train(*self._batch)
        else:
            self._graph.replay()
            assert self._loss is not None
            loss = self._loss.clone()
        self.done += 1
        return loss

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; the optimizer's groups keep the rate that replays read."""
        super().restore(state)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate

    def _capture(self) -> None:
        """Record a step on the stream that the eager steps ran on; nothing is trained by this."""
        assert self._batch is not None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self._loss = self.train(*self._batch)
        except RuntimeError as error:
            self._graphs = False
            reason = str(error).splitlines()[0]
            print(f"steps are eager from here, since one could not be captured: {reason}", file=sys.stderr)
        else:
            self._graph = graph
