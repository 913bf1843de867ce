"""How the kernels around a layer's recurrence are launched: what their module says in its ``LAUNCH``, with types."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple


class LayerPlan(NamedTuple):
    """Everything that launchers must know of a module's layer kernels."""

    q_end: int
    k_end: int
    channels: int
    """Channels of q, k and v together; those of q end before ``q_end``, those of k before ``k_end``."""
    inner: int
    """Channels of all heads of y."""
    conv: tuple[int, int, int]
    """Tokens and channels of a program of the convolution, and its warps."""
    unconv: tuple[int, int, int]
    """Steps and channels of a program of its backward, and its warps."""
    decay: tuple[int, int]
    """Tokens of a program of the gate's kernels, and its warps; so for the epilogue and its backward."""
    finish: tuple[int, int]
    unfinish: tuple[int, int]
    scale: tuple[int, int]
    """Tokens of a program that scales rows, and its warps."""
    decode: tuple[int, int, int]
    """Programs of a token of the decode kernel, its warps, and the float32 numbers that a program needs."""


@functools.cache
def layer_plan_of(kernels: ModuleType) -> LayerPlan:
    """Return how the kernels of a module are launched."""
    return LayerPlan(**kernels.LAUNCH)
