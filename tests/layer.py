"""A layer that uses the operator, as a model would write it, and one step of its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Mixer(nn.Module):
    """A layer as a model would write it."""

    def __init__(self, m2rnn: Callable[..., Any]) -> None:
        super().__init__()
        self.m2rnn = m2rnn
        self.project = nn.Linear(8, 16 + 16 + 32 + 2)
        self.weight = nn.Parameter(torch.eye(16).repeat(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate = self.project(x).split([16, 16, 32, 2], -1)
        y, _ = self.m2rnn(
            q.unflatten(-1, (1, 16)), k.unflatten(-1, (1, 16)), v.unflatten(-1, (2, 16)), self.weight, gate.sigmoid()
        )
        return y.flatten(-2)


def trained(mixer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradients of a module's parameters."""
    y = mixer(x)
    names = [name for name, _ in mixer.named_parameters()]
    gradients = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}
