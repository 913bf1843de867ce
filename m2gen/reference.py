"""The recurrence in eager PyTorch with plain autograd: slow, obvious, and the oracle that kernels answer to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from m2gen.spec import ClipMode


class _ClampGradient(torch.autograd.Function):
    """Identity whose gradient is clamped to [-bound, bound]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.bound = bound
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clamp(-ctx.bound, ctx.bound), None


class _RoundedTanh(torch.autograd.Function):
    """tanh whose result keeps float16's 11 significant bits: the error bound of ``tanh.approx.f32``, 2^-11."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        z = x.tanh().to(torch.float16).to(x.dtype)
        ctx.save_for_backward(z)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        z: Tensor = ctx.saved_tensors[0]
        return grad * (1 - z * z)


_clamp_gradient: Callable[[Tensor, float], Tensor] = _ClampGradient.apply
_rounded_tanh: Callable[[Tensor], Tensor] = _RoundedTanh.apply


@dataclass(frozen=True)
class Arithmetic:
    """Where the reference rounds, so that it can make the errors that a kernel's own dtypes must make."""

    state: torch.dtype
    """Of the state and of every accumulation."""
    operand: torch.dtype
    """That H and the weight are rounded to before their product."""
    rounded_tanh: bool = False


EXACT = Arithmetic(torch.float64, torch.float64)


def _per_head(x: Tensor, total: int, dim: int) -> Tensor:
    """Give each of ``total`` heads its group's slice: head n reads group n // (total // groups)."""
    return x.repeat_interleave(total // x.shape[dim], dim)


def _sequence(
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    weight: Tensor,
    state: Tensor,
    bound: float,
    mode: ClipMode,
    arithmetic: Arithmetic,
) -> tuple[Tensor, Tensor]:
    """Run q, k, v, f of shapes (B, S, N, ...) from ``state`` (B, N, K, V); return y (B, S, N, V), final state."""
    q, k, v, f = operands
    tanh = _rounded_tanh if arithmetic.rounded_tanh else torch.tanh
    outputs = []
    for t in range(q.shape[1]):
        product = state.to(arithmetic.operand).to(arithmetic.state) @ weight
        z = tanh(product + k[:, t, :, :, None] * v[:, t, :, None, :])
        gate = f[:, t, :, None, None]
        state = gate * state + (1 - gate) * z
        if mode is ClipMode.TOTAL:
            state = _clamp_gradient(state, bound)
        outputs.append((q[:, t, :, :, None] * state).sum(-2))
        if mode is ClipMode.CARRY:
            state = _clamp_gradient(state, bound)
    y = torch.stack(outputs, 1) if outputs else v.new_zeros(v.shape)
    return y, state


def m2rnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    clip: float | None = 1.0,
    mode: ClipMode = ClipMode.CARRY,
    arithmetic: Arithmetic | None = None,
) -> tuple[Tensor, Tensor]:
    """Evaluate docs/design.md section 2 step by step.

    q (B, S, Nq, K), k (B, S, Nk, K), v (B, S, Nv, V), weight (Nw, V, V), forget (B, S, Nf) and the optional
    initial_state (B, N, K, V) give y (B, S, N, V) in q's dtype and the final state (B, N, K, V). With cu_seqlens
    (B + 1,) the first two dims of q, k, v and forget are one, of length T. ``clip`` bounds the state's gradient
    (None: no bound). Without ``arithmetic`` everything is computed in q's dtype.
    """
    arithmetic = arithmetic or Arithmetic(q.dtype, q.dtype)
    total = max(x.shape[-2] for x in (q, k, v)) if q.dim() > 1 else 1
    total = max(total, forget.shape[-1], weight.shape[0])
    bound = float("inf") if clip is None else float(clip)
    packed = cu_seqlens is not None
    wide = [x.to(arithmetic.state).unsqueeze(0) if packed else x.to(arithmetic.state) for x in (q, k, v, forget)]
    operands = tuple(_per_head(x, total, 2) for x in wide)
    matrix = _per_head(weight.to(arithmetic.operand).to(arithmetic.state), total, 0)
    spans = [(0, wide[0].shape[1])]
    if cu_seqlens is not None:
        spans = list(pairwise(cu_seqlens.tolist()))
    batch = len(spans) if packed else q.shape[0]
    if initial_state is None:
        initial_state = q.new_zeros(batch, total, q.shape[-1], v.shape[-1], dtype=arithmetic.state)
    starts = initial_state.to(arithmetic.state)
    starts = starts.unsqueeze(1) if packed else starts.unsqueeze(0)
    runs = [
        _sequence(tuple(x[:, a:b] for x in operands), matrix, start, bound, mode, arithmetic)  # type: ignore[arg-type]
        for (a, b), start in zip(spans, starts, strict=True)
    ]
    y = torch.cat([run[0] for run in runs], 1) if runs else operands[2]
    state = torch.cat([run[1] for run in runs], 0) if runs else initial_state
    return (y.squeeze(0) if packed else y).to(q.dtype), state
