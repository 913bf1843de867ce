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


class Replayed:
    """A function of a batch that, after ``warm`` eager calls, is replayed from a graph; batches have one shape.

    A batch of another shape is given to the function itself. Calls stay eager on a CPU, and where the function cannot
    be captured, which is said.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], warm: int, device: torch.device) -> None:
        self.function, self.device = function, device
        self.graph: torch.cuda.CUDAGraph | None = None
        self._eager = warm if device.type == "cuda" else -1
        self._batch: tuple[Tensor, Tensor] | None = None
        self._result: Tensor | None = None

    def __call__(self, tokens: Tensor, following: Tensor) -> Tensor:
        """Return what the function makes of a batch."""
        if self._batch is None:
            self._batch = torch.empty_like(tokens, device=self.device), torch.empty_like(following, device=self.device)
        if tokens.shape != self._batch[0].shape:
            return self.function(tokens.to(self.device), following.to(self.device))
        for place, given in zip(self._batch, (tokens, following), strict=True):
            place.copy_(given)
        if self.graph is None and self._eager == 0:
            self._capture(*self._batch)
        if self.graph is None:
            self._eager -= 1
            return self.function(*self._batch)
        self.graph.replay()
        assert self._result is not None
        return self._result.clone()

    def _capture(self, *batch: Tensor) -> None:
        """Record a call on the stream that the eager ones ran on; nothing is computed by this."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self._result = self.function(*batch)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            print(f"{self.function.__name__} stays eager, since it could not be captured: {reason}", file=sys.stderr)
        else:
            self.graph = graph


class CapturedTrainer(Trainer):
    """A trainer whose steps and losses are replays of one, on a GPU. It is to be used within ``own_stream``."""

    def __init__(self, config: Config, device: torch.device, make: Callable[[Config], Decoder] | None = None) -> None:
        self._rate = torch.zeros((), device=device)
        super().__init__(config, device, make)
        self.training = Replayed(self.train, WARM, device)
        self.judging = Replayed(super().judged, 1, device)

    def optimizer_options(self) -> dict[str, Any]:
        """Return what the optimizer is told: a rate that a replay reads anew."""
        return {"lr": self._rate, "capturable": self._rate.is_cuda}

    def step(self, tokens: Tensor, following: Tensor) -> Tensor:
        """Train on one batch and return its loss."""
        self._rate.fill_(self.config.learning_rate * self.rate())
        loss = self.training(tokens, following)
        self.done += 1
        return loss

    def judged(self, tokens: Tensor, following: Tensor) -> Tensor:
        """Return the sum of the losses of a batch, in nats."""
        return self.judging(tokens, following)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; the optimizer's groups keep the rate that replays read."""
        super().restore(state)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate
