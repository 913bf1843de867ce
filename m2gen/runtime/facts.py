"""Types of the facts in ``built``, and of values that several modules pass."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch

Backend: TypeAlias = Literal["kernels", "reference"]
"""Implementation that computes the operator."""
VariantKey: TypeAlias = tuple[int, int, tuple[int, ...], torch.dtype, bool]
"""K, V, the heads of q, k, v, f and w, the dtype of q, k and v, and whether the kernel computes the gate."""

LayerKey: TypeAlias = tuple[int, int, tuple[int, ...], torch.dtype]
"""K, V, the heads of q, k, v, f and w, and the dtype of the input projection's rows."""


class HeadCounts(NamedTuple):
    """How many heads q, k, v, the forget gate f and the state weight w have; each divides the most of them."""

    q: int
    k: int
    v: int
    f: int
    w: int


Point: TypeAlias = tuple[int, int, tuple[int, ...]]
"""K, V and the heads of one point of a layer's grid."""
