"""How many floating-point operations the products of a call take, for torch.utils.flop_counter.

As torch counts its own operators: products of matrices and vectors, two for a multiplication and its addition; not
what is done to single elements. The backward's include those of rebuilding the states once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, *_: Any, out_val: tuple[Tensor, Tensor, Tensor], **__: Any) -> int:
    """Count H W, k v^T and H^T q of every step and head."""
    return _products(q, out_val[1], v.shape[-1] + 2)


def backward(
    dy: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    checkpoints: Tensor,
    cu_seqlens: Tensor | None,
    bound: float,
    wanted: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    """Count H W and k v^T again; H dy for q; q dy^T and D W^T, and for k D v, for v D^T k, for the weight H^T D."""
    cols = v.shape[-1]
    want_q, want_k, want_v, want_w = wanted[:4]
    carried = cols + 1 if any(wanted[1:]) else 0
    return _products(q, checkpoints, cols + 1 + want_q + carried + want_k + want_v + cols * want_w)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    **_: Any,
) -> int:
    """Count what the forward of one step does."""
    return _products(q, state, v.shape[-1] + 2)


def _products(q: Tensor, states: Tensor, terms: int) -> int:
    """Count multiplications and additions, ``terms`` for every step and element of its states (..., N, K, V)."""
    return 2 * math.prod(q.shape[:-2]) * math.prod(states.shape[1:]) * terms
