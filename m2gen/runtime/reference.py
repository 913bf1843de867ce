"""The recurrence in eager PyTorch with plain autograd: slow, obvious, and the oracle that kernels answer to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class _ClampGradient(torch.autograd.Function):
    """Identity whose gradient is clamped to [-bound, bound]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clamp(-ctx.bound, ctx.bound), None


class _ClampGradientAlone(_ClampGradient):
    """The same clamp, which passes tangents on; a class apart, since torch.compile takes no Function that has one."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, bound: None) -> Tensor:
        return tangent.view_as(tangent)


def _clamp_gradient(x: Tensor, bound: float) -> Tensor:
    function = _ClampGradient if torch.compiler.is_compiling() else _ClampGradientAlone
    apply: Callable[[Tensor, float], Tensor] = function.apply
    return apply(x, bound)


def _kept(x: Tensor, bits: int, grid: float) -> Tensor:
    """Return float32 values rounded to ``bits`` significant bits on a grid (see ``Arithmetic.grid``)."""
    dropped = 24 - bits

    def rounded(wide: Tensor) -> Tensor:
        return ((wide.contiguous().view(torch.int32) + (1 << (dropped - 1))) & -(1 << dropped)).view(torch.float32)

    return _on_grid(x.float(), rounded, grid).to(x.dtype)


def _on_grid(x: Tensor, rounded: Callable[[Tensor], Tensor], grid: float) -> Tensor:
    """Return ``rounded`` values of x times grid, over grid; numbers that no rounding changes stay as they are."""
    nominal = rounded(x)
    return nominal if grid == 1.0 else torch.where(nominal == x, nominal, rounded(x * grid) / grid)


class _Rounded(torch.autograd.Function):
    """Identity that keeps some significant bits of a float32 tensor, and of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, grid: float) -> Tensor:
        ctx.bits, ctx.grid = bits, grid
        return _kept(x, bits, grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _kept(grad, ctx.bits, ctx.grid), None, None


class _RoundedTanh(torch.autograd.Function):
    """tanh of which some significant bits are kept, and the slope that this value gives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, grid: float) -> Tensor:
        z = _kept(x.tanh(), bits, grid).clamp(-1, 1)
        ctx.save_for_backward(z)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z: Tensor = ctx.saved_tensors[0]
        return grad * (1 - z * z), None, None


_rounded: Callable[[Tensor, int, float], Tensor] = _Rounded.apply
_rounded_tanh: Callable[[Tensor, int, float], Tensor] = _RoundedTanh.apply
TF32_BITS = 11


@dataclass(frozen=True)
class Arithmetic:
    """Where the reference rounds, so that it can make the errors that a kernel's own dtypes must make."""

    state: torch.dtype
    """The dtype of the state and of every accumulation."""
    operand: torch.dtype
    """H and the weight are rounded to this dtype before their product."""
    tf32: bool = False
    """Round H and the weight to tf32 on top."""
    tanh_bits: int | None = None
    """Significant bits of tanh; None for all of the state's dtype."""
    gate_bits: int | None = None
    """Significant bits of the functions that a gate is computed with; None likewise."""
    kept: torch.dtype | None = None
    """The state is rounded to this dtype before and after every step, as decoding keeps it; None for ``state``."""
    grid: float = 1.0
    """H and function values are rounded as multiples of their last place over this, 1 up to 2. The errors are
    as large on every grid, and independent of each other, so several grids show what a tensor's error may be."""

    def as_operand(self, x: Tensor, grid: float = 1.0) -> Tensor:
        """Return x as the product with H or the weight sees it."""
        wide = x.to(self.state)
        if self.operand is self.state:
            return _rounded(wide, TF32_BITS, grid) if self.tf32 else wide
        return self._through(wide, self.operand, grid)

    def as_kept(self, state: Tensor) -> Tensor:
        """Return the state as the next step finds it."""
        return state if self.kept is None else self._through(state, self.kept, self.grid)

    def _through(self, x: Tensor, dtype: torch.dtype, grid: float) -> Tensor:
        return _on_grid(x, lambda values: values.to(dtype).to(self.state), grid)

    def tanh(self, x: Tensor) -> Tensor:
        """Return tanh of x as a kernel's instructions give it."""
        return x.tanh() if self.tanh_bits is None else _rounded_tanh(x, self.tanh_bits, self.grid)

    def as_function(self, x: Tensor) -> Tensor:
        """Return x as the value of a function that a gate is computed with."""
        return x if self.gate_bits is None else _rounded(x, self.gate_bits, self.grid)


EXACT = Arithmetic(torch.float64, torch.float64)


def forget_gate(
    x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, arithmetic: Arithmetic = EXACT
) -> tuple[Tensor, Tensor]:
    """Return f and 1 - f, both accurate where f is near 1: x itself, or exp(-exp(A_log) softplus(x + dt_bias)).

    x (..., Nf), A_log (Nf,) and dt_bias (Nf,); the parametrisation is that of the published layer.
    """
    if A_log is None or dt_bias is None:
        return x, 1 - x
    shifted = x + dt_bias
    softplus = torch.logaddexp(shifted, torch.zeros_like(shifted))
    decay = A_log.exp() * arithmetic.as_function(softplus)
    return arithmetic.as_function(torch.exp(-decay)), arithmetic.as_function(-torch.expm1(-decay))


def _per_head(x: Tensor, total: int, dim: int) -> Tensor:
    """Give each of ``total`` heads its group's slice: head n reads group n // (total // groups)."""
    return x.repeat_interleave(int(total) // int(x.shape[dim]), dim)  # under a tracer both are tensors of the CPU


@dataclass(frozen=True)
class _Rules:
    """Operands that all sequences of one call share."""

    bound: float
    clamp_total: bool
    arithmetic: Arithmetic


def _sequence(operands: tuple[Tensor, ...], weight: Tensor, state: Tensor, rules: _Rules) -> tuple[Tensor, Tensor]:
    """Run q, k, v, f, 1 - f of shapes (B, S, N, ...) from ``state`` (B, N, K, V); return y and the final state."""
    q, k, v, f, rest = operands
    arithmetic = rules.arithmetic
    outputs = []
    for t in range(q.shape[1]):
        product = arithmetic.as_operand(state, arithmetic.grid) @ weight
        z = arithmetic.tanh(product + k[:, t, :, :, None] * v[:, t, :, None, :])
        state = f[:, t, :, None, None] * state + rest[:, t, :, None, None] * z
        if rules.clamp_total:
            state = _clamp_gradient(state, rules.bound)
        outputs.append((q[:, t, :, :, None] * state).sum(-2))
        if not rules.clamp_total:
            state = _clamp_gradient(state, rules.bound)
        state = arithmetic.as_kept(state)
    y = torch.stack(outputs, 1) if outputs else v.new_zeros(v.shape)
    return y, state


def _sequences(
    operands: tuple[Tensor, ...], weight: Tensor, starts: Tensor, spans: list[tuple[int, int]], rules: _Rules
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run each sequence, of the steps that ``spans`` say, from a state of its own."""
    for (begin, end), start in zip(spans, starts, strict=True):
        yield _sequence(tuple(x[:, begin:end] for x in operands), weight, start, rules)


def _spans(cu_seqlens: Tensor, tokens: int) -> list[tuple[int, int]]:
    """Return where each sequence starts and ends; on the meta device, where nobody can tell, all is the first's."""
    offsets = [0] + [tokens] * (cu_seqlens.shape[0] - 1) if cu_seqlens.is_meta else cu_seqlens.tolist()
    return list(pairwise(offsets))


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
    operands = tuple(_per_head(x, total, 2) for x in (*wide[:3], *forget_gate(wide[3], A_log, dt_bias, arithmetic)))
    matrix = _per_head(arithmetic.as_operand(weight), total, 0)
    spans = [(0, wide[0].shape[1])] if cu_seqlens is None else _spans(cu_seqlens, wide[0].shape[1])
    batch = len(spans) if packed else q.shape[0]
    if initial_state is None:
        initial_state = q.new_zeros(batch, total, q.shape[-1], v.shape[-1], dtype=arithmetic.state)
    starts = arithmetic.as_kept(initial_state.to(arithmetic.state)).unsqueeze(1 if packed else 0)
    runs = list(_sequences(operands, matrix, starts, spans, rules))
    y = torch.cat([run[0] for run in runs], 1) if runs else operands[2]
    state = torch.cat([run[1] for run in runs], 0) if runs else initial_state
    if not q.shape[0 if packed else 1]:  # gradients of all operands are 0, as those of kernels, and not missing
        nothing = torch.stack([x[:0].sum() for x in (*operands, matrix)]).sum()
        y, state = y + nothing, state + nothing
    return (y.squeeze(0) if packed else y).to(q.dtype), state
