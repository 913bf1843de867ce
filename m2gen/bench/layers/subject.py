"""What the adapter of a layer returns: the layer, the same in float64, and its decoding.

An adapter takes a ``LayerShape`` and returns a ``LayerSubject``, or None if it cannot serve it. An installed package
registers its adapter as an entry point of the group ``m2gen.bench.layers``; ``m2gen bench --layers --peer-layer
module:function`` names one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from m2gen.variant import Variant

Exact: TypeAlias = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""Evaluates a layer in plain PyTorch, in the dtypes of its parameters by name and of x (B, S, hidden)."""


@dataclass(frozen=True)
class LayerShape:
    """The layer beside which another is timed."""

    hidden: int
    variant: Variant
    dtype: torch.dtype
    device: torch.device
    timing_only: bool = False
    """Whether a guard by which a package refuses to run here may be passed; ``LayerSubject.guard`` then says which."""


@dataclass(frozen=True)
class Decoder:
    """Sequences that take one token after the other."""

    step: Callable[[Tensor], Tensor]
    """Takes x (B, 1, hidden) and moves the states on in place; can be captured once it was called."""
    traffic: Callable[[], int]
    """Returns the bytes of states that a token reads and writes, once ``step`` was called."""


@dataclass(frozen=True)
class LayerSubject:
    """A layer that can be checked and timed."""

    module: nn.Module
    """Has the parameters, in the dtypes that the layer trains in."""
    call: Callable[[Tensor], Tensor]
    """Takes x (B, S, hidden) to the same shape; differentiable."""
    exact: Exact | None
    """None if the adapter knows no plain form: then times are times only."""
    decoder: Callable[[int, int], Decoder] | None = None
    """Takes a batch and how many tokens are there before."""
    packages: tuple[str, ...] = ()
    """Distributions whose versions belong to the times, beside torch and Triton."""
    guard: str = ""
    """The refusal of the backward that was passed, for which times of sequences are times only."""


def same_in(module: nn.Module) -> Exact:
    """Return the evaluation of a module that is plain PyTorch already."""

    def exact(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = functional_call(copy.deepcopy(module).to(x.dtype), dict(parameters), (x,))
        return y

    return exact
