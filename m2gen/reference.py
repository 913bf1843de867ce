"""The recurrence in eager PyTorch with plain autograd: slow, obvious, and the oracle that kernels answer to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


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


class _RoundedToTf32(torch.autograd.Function):
    """Identity that keeps tf32's 11 significant bits of a float32 tensor, and of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        bits = x.float().contiguous().view(torch.int32)
        return ((bits + 0x1000) & -0x2000).view(torch.float32).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _RoundedToTf32.forward(ctx, grad)


_clamp_gradient: Callable[[Tensor, float], Tensor] = _ClampGradient.apply
_rounded_tanh: Callable[[Tensor], Tensor] = _RoundedTanh.apply
_rounded_to_tf32: Callable[[Tensor], Tensor] = _RoundedToTf32.apply


@dataclass(frozen=True)
class Arithmetic:
    """Where the reference rounds, so that it can make the errors that a kernel's own dtypes must make."""

    state: torch.dtype
    """Of the state and of every accumulation."""
    operand: torch.dtype
    """That H and the weight are rounded to before their product."""
    rounded_tanh: bool = False
    tf32: bool = False
    """Round H and the weight to tf32 on top."""

    def as_operand(self, x: Tensor) -> Tensor:
        """Return x as the product with H or the weight sees it."""
        narrow = x.to(self.operand).to(self.state)
        return _rounded_to_tf32(narrow) if self.tf32 else narrow


EXACT = Arithmetic(torch.float64, torch.float64)


def forget_gate(x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return f and 1 - f, both accurate where f is near 1: x itself, or exp(-exp(A_log) softplus(x + dt_bias)).

    x (..., Nf), A_log (Nf,) and dt_bias (Nf,); the parametrisation is that of the published layer.
    """
    if A_log is None or dt_bias is None:
        return x, 1 - x
    shifted = x + dt_bias
    decay = A_log.exp() * torch.logaddexp(shifted, torch.zeros_like(shifted))
    return torch.exp(-decay), -torch.expm1(-decay)


def _per_head(x: Tensor, total: int, dim: int) -> Tensor:
    """Give each of ``total`` heads its group's slice: head n reads group n // (total // groups)."""
    return x.repeat_interleave(total // x.shape[dim], dim)


@dataclass(frozen=True)
class _Rules:
    """What every sequence of one call has in common."""

    bound: float
    clamp_total: bool
    arithmetic: Arithmetic


def _sequence(operands: tuple[Tensor, ...], weight: Tensor, state: Tensor, rules: _Rules) -> tuple[Tensor, Tensor]:
    """Run q, k, v, f, 1 - f of shapes (B, S, N, ...) from ``state`` (B, N, K, V); return y and the final state."""
    q, k, v, f, rest = operands
    tanh = _rounded_tanh if rules.arithmetic.rounded_tanh else torch.tanh
    outputs = []
    for t in range(q.shape[1]):
        product = rules.arithmetic.as_operand(state) @ weight
        z = tanh(product + k[:, t, :, :, None] * v[:, t, :, None, :])
        state = f[:, t, :, None, None] * state + rest[:, t, :, None, None] * z
        if rules.clamp_total:
            state = _clamp_gradient(state, rules.bound)
        outputs.append((q[:, t, :, :, None] * state).sum(-2))
        if not rules.clamp_total:
            state = _clamp_gradient(state, rules.bound)
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
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    clip: float | None = 1.0,
    clamp_total: bool = False,
    arithmetic: Arithmetic | None = None,
) -> tuple[Tensor, Tensor]:
    """Evaluate H_t = f_t H_(t-1) + (1 - f_t) tanh(H_(t-1) W + k_t v_t^T), y_t = H_t^T q_t step by step.

    q (B, S, Nq, K), k (B, S, Nk, K), v (B, S, Nv, V), weight (Nw, V, V), forget (B, S, Nf) and the optional
    initial_state (B, N, K, V) give y (B, S, N, V) in q's dtype and the final state (B, N, K, V). With cu_seqlens
    (B + 1,) the first two dims of q, k, v and forget are one, of length T. With A_log and dt_bias (Nf,), forget is
    the gate's input (see ``forget_gate``). ``clip`` bounds the state's gradient (None: no bound): the one carried
    from later steps, or with ``clamp_total`` the whole of it. Without ``arithmetic`` all is computed in q's dtype.
    """
    arithmetic = arithmetic or Arithmetic(q.dtype, q.dtype)
    total = max(q.shape[-2], k.shape[-2], v.shape[-2], forget.shape[-1], weight.shape[0])
    rules = _Rules(float("inf") if clip is None else float(clip), clamp_total, arithmetic)
    packed = cu_seqlens is not None
    A_log, dt_bias = (x if x is None else x.to(arithmetic.state) for x in (A_log, dt_bias))
    wide = [x.to(arithmetic.state).unsqueeze(0) if packed else x.to(arithmetic.state) for x in (q, k, v, forget)]
    operands = tuple(_per_head(x, total, 2) for x in (*wide[:3], *forget_gate(wide[3], A_log, dt_bias)))
    matrix = _per_head(arithmetic.as_operand(weight), total, 0)
    spans = [(0, wide[0].shape[1])] if cu_seqlens is None else list(pairwise(cu_seqlens.tolist()))
    batch = len(spans) if packed else q.shape[0]
    if initial_state is None:
        initial_state = q.new_zeros(batch, total, q.shape[-1], v.shape[-1], dtype=arithmetic.state)
    starts = initial_state.to(arithmetic.state)
    starts = starts.unsqueeze(1) if packed else starts.unsqueeze(0)
    runs = [
        _sequence(tuple(x[:, a:b] for x in operands), matrix, start, rules)
        for (a, b), start in zip(spans, starts, strict=True)
    ]
    y = torch.cat([run[0] for run in runs], 1) if runs else operands[2]
    state = torch.cat([run[1] for run in runs], 0) if runs else initial_state
    return (y.squeeze(0) if packed else y).to(q.dtype), state
