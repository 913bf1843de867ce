"""Fake results of the operators, without values, for compilers and tracers."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    bound: float,
    save: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the final state and as many checkpoints as the kernels save."""
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    none = (0, torch.float32)
    count, dtype = dispatch.checkpoints_of(q, k, v, weight, forget, A_log, cu_seqlens) if save else none
    heads = total_heads(q, k, v, weight, forget)
    y = v.new_empty(*v.shape[:-2], heads, v.shape[-1])
    state_shape = (heads, q.shape[-1], v.shape[-1])
    state = q.new_empty(batch, *state_shape, dtype=torch.float32)
    return y, state, q.new_empty(count, *state_shape, dtype=dtype)


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
    wanted: list[bool],
    deterministic: bool,
) -> list[Tensor]:
    """Return the ``wanted`` gradients."""
    operands = (q, k, v, weight, forget, A_log, dt_bias)
    gradients = [x.new_empty(x.shape) for x, want in zip(operands, wanted, strict=False) if want and x is not None]
    if wanted[-1]:
        batch = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (batch, total_heads(q, k, v, weight, forget), q.shape[-1], v.shape[-1])
        gradients.append(q.new_empty(shape, dtype=torch.float32))
    return gradients


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
) -> Tensor:
    """Return y."""
    return v.new_empty(v.shape[0], state.shape[1], v.shape[-1])


def total_heads(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, forget: Tensor) -> int:
    """Return N, the heads of the state."""
    return max(q.shape[-2], k.shape[-2], v.shape[-2], weight.shape[0], forget.shape[-1])
