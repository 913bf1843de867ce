"""Launch the kernels on pools of states: tokens of many requests, and states out of their slots and into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, launches
from .buffers import Operands
from .known import KnownCall
from .layer_launches import LayerKernels
from .pool_plan import PoolPlan, pool_plan_of


class Slots(NamedTuple):
    """Slots that states come from and go to; a negative one is not read or written."""

    indices: Tensor
    """Slots to start from, (B,); or (B, C), of which ``accepted`` chooses one."""
    out_indices: Tensor
    """Slots of the states after each token, (B, T); or after the last one, (B,)."""
    accepted: Tensor | None = None
    """Column of ``indices`` that a request starts from, (B,), counted from 1."""
    seed: Tensor | None = None
    """Seed of the rounding of a narrow pool, () or (B,); token t takes the t-th after it."""


def steps(operands: Operands, pool: Tensor, slots: Slots, call: KnownCall | None = None) -> Tensor:
    """Advance states of the pool by the operands' tokens (B, T, ...), or (B, ...) of one; return y (B, T, N, V)."""
    known = None if call is None else call.launches
    module = None if call is None else call.kernels
    if module is None:
        module = dispatch.pool_steps_kernels(dims_of(*operands[:5]), operands[0], slots.seed is not None)
    if call is not None:
        call.kernels = module
    kernels = _Kernels(LayerKernels(module, known), pool_plan_of(module))
    y: Tensor = launches.on_device(_steps, pool.get_device(), (kernels, operands, pool, slots))
    return y


def gather(
    pool: Tensor, indices: Tensor, has_state: Tensor | None, dims: Sequence[int], call: KnownCall | None = None
) -> Tensor:
    """Return states (B, N, K, V) in float32; zeros where ``has_state`` (B,) is false, or there is no slot."""
    state: Tensor = launches.on_device(
        _gather, pool.get_device(), (_kernels(dims, pool, call), pool, indices, has_state)
    )
    return state


def scatter(
    state: Tensor,
    pool: Tensor,
    indices: Tensor,
    seed: Tensor | None,
    dims: Sequence[int],
    call: KnownCall | None = None,
) -> None:
    """Leave states (B, N, K, V), contiguous and in float32, in their slots."""
    launches.on_device(_scatter, pool.get_device(), (_kernels(dims, pool, call), state, pool, indices, seed))


class Kept(NamedTuple):
    """States of sequences that are kept after every so many tokens, each in a slot."""

    indices: Tensor
    """Slots, (B, M): that of the state after ``(m + 1) * every`` tokens."""
    every: int
    seed: Tensor | None = None


class Forward(NamedTuple):
    """A forward's results and its checkpoints: a state every ``interval`` steps of each sequence."""

    last: Tensor
    checkpoints: Tensor
    interval: int
    cu_seqlens: Tensor | None
    steps: int
    """Steps of each sequence; all tokens of a packed batch."""


def keep(found: Forward, pool: Tensor, kept: Kept, dims: Sequence[int]) -> None:
    """Leave states of a forward in their slots; raises ValueError where the forward saved no such states."""
    if kept.every % found.interval:
        multiple = f"a multiple of the {found.interval} steps between the kernels' states"
        raise ValueError(f"m2rnn: states_every must be {multiple}, got {kept.every}")
    launches.on_device(_keep, pool.get_device(), (_kernels(dims, pool, None), found, pool, kept))


def dims_of(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, forget: Tensor) -> tuple[int, ...]:
    """Return what kernels on pools are looked up by; a compiler that knows sizes as symbols learns their values."""
    heads = (q.shape[-2], k.shape[-2], v.shape[-2], forget.shape[-1], weight.shape[0])
    return int(q.shape[-1]), int(v.shape[-1]), *(int(count) for count in heads)


class _Kernels(NamedTuple):
    module: LayerKernels
    plan: PoolPlan


def _kernels(dims: Sequence[int], pool: Tensor, call: KnownCall | None) -> _Kernels:
    if call is None:
        module, known = dispatch.pool_kernels(dims, pool.device), None
    else:
        if call.kernels is None:
            call.kernels = dispatch.pool_kernels(dims, pool.device)
        module, known = call.kernels, call.launches
    return _Kernels(LayerKernels(module, known), pool_plan_of(module))


def _steps(kernels: _Kernels, operands: Operands, pool: Tensor, slots: Slots) -> Tensor:
    plan, (q, k, v, weight, forget, A_log, dt_bias) = kernels.plan, operands
    y = v.new_empty(*q.shape[:-2], plan.heads, plan.cols)
    count = q.shape[1] if q.dim() == 4 else 1
    known = kernels.module.known
    numbers = () if known is not None and "steps" in known else _numbers(operands, pool, slots)
    kernels.module.launch(
        "steps", q.shape[0] * plan.heads if count else 0, plan.warps,
        (q, k, v, weight, forget, A_log, dt_bias, y, *slots, pool), numbers, plan.registers if count == 1 else 0,
        STEPS=count, STEPS_PAD=1 << (count - 1).bit_length(), EVERY=slots.out_indices.dim() == 2,
        APPROXIMATE=dispatch.approximates(pool.device),
    )  # fmt: skip
    return y


def _numbers(operands: Operands, pool: Tensor, slots: Slots) -> tuple[int, ...]:
    """Return the numbers that the kernel of steps takes; a step's operands have no dim of tokens."""
    q, k, v, weight, forget, _, _ = operands
    if q.dim() == 3:
        q, k, v, forget = (x.unsqueeze(1) for x in (q, k, v, forget))
    table, out = slots.indices, slots.out_indices
    return (
        *q.stride(), *k.stride(), *v.stride(), *weight.stride(), *forget.stride(), *pool.stride(),
        *_strides(table), *_strides(out), _stride(slots.accepted), _stride(slots.seed),
        pool.shape[0], table.shape[1] if table.dim() == 2 else 1,
    )  # fmt: skip


def _gather(kernels: _Kernels, pool: Tensor, indices: Tensor, has_state: Tensor | None) -> Tensor:
    plan, batch = kernels.plan, indices.shape[0]
    state = pool.new_empty(batch, plan.heads, plan.rows, plan.cols, dtype=torch.float32)
    kernels.module.launch(
        "gather", batch * plan.heads, plan.warps, (state, indices, has_state, pool),
        (*pool.stride(), indices.stride(0), _stride(has_state), pool.shape[0]),
    )  # fmt: skip
    return state


def _scatter(kernels: _Kernels, state: Tensor, pool: Tensor, indices: Tensor, seed: Tensor | None) -> None:
    plan = kernels.plan
    kernels.module.launch(
        "scatter", indices.shape[0] * plan.heads, plan.warps, (state, indices, seed, pool),
        (*pool.stride(), indices.stride(0), _stride(seed), pool.shape[0]),
    )  # fmt: skip


def _keep(kernels: _Kernels, found: Forward, pool: Tensor, kept: Kept) -> None:
    plan, (batch, states) = kernels.plan, kept.indices.shape
    intervals = (found.steps + found.interval - 1) // found.interval
    kernels.module.launch(
        "keep", batch * states * plan.heads, plan.warps,
        (found.checkpoints, found.last, found.cu_seqlens, kept.indices, kept.seed, pool),
        (
            *pool.stride(), *kept.indices.stride(), _stride(kept.seed), pool.shape[0], states, found.steps, intervals,
            kept.every, found.interval,
        ),
    )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int]:
    return (x.stride(0), x.stride(1)) if x.dim() == 2 else (x.stride(0), 0)


def _stride(x: Tensor | None) -> int:
    """Return how far elements of requests are apart; 0 where all have one."""
    return 0 if x is None or x.numel() == 1 else x.stride(0)
