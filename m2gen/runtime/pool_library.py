"""The operators on pools of states as torch knows them: schemas, kernels, fake results, rules for transforms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch, launch_plan, launches, memory, pool_launches, transforms
from .pool_launches import Slots
from .transforms import Rules

_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor weight, Tensor forget, Tensor? A_log, Tensor? dt_bias"
_READ = ("q", "k", "v", "weight", "forget", "A_log", "dt_bias")
SCHEMAS = {
    "pool_steps": f"({_OPERANDS}, Tensor indices, Tensor out_indices, Tensor? accepted, Tensor? seed, Tensor(a!) pool)"
    " -> Tensor",
    "pool_gather": "(Tensor pool, Tensor indices, Tensor? has_initial_state, int[] dims) -> Tensor",
    "pool_scan": f"({_OPERANDS}, Tensor initial_state, Tensor? cu_seqlens, Tensor? cu_seqlens_cpu, Tensor indices,"
    " Tensor? seed, int every, bool deterministic, Tensor(a!) pool) -> (Tensor, Tensor)",
    "pool_scatter": "(Tensor state, Tensor indices, Tensor? seed, int[] dims, Tensor(a!) pool) -> ()",
}


def rules(operators: dict[str, Any]) -> dict[str, Rules]:
    """Return the rules of the operators of ``SCHEMAS``, given as torch has them, by name."""
    kernels: dict[str, Callable[..., Any]] = {
        "pool_steps": _steps,
        "pool_gather": _gather,
        "pool_scan": _scan,
        "pool_scatter": _scatter,
    }
    fakes = {
        "pool_steps": _fake_steps,
        "pool_gather": _fake_gather,
        "pool_scan": _fake_scan,
        "pool_scatter": _fake_scatter,
    }
    flops = {
        "pool_steps": _flops,
        "pool_gather": _no_flops,
        "pool_scan": _flops,
        "pool_scatter": _no_flops,
    }
    return {
        name: Rules(kernel, _without_gradients(operators[name]), _mapped(operators[name]), fakes[name], flops[name])
        for name, kernel in kernels.items()
    }


def _steps(*arguments: Any) -> Tensor:
    *operands, indices, out_indices, accepted, seed, pool = arguments
    memory.check_written("m2rnn_steps", "pool", pool, dict(zip(_READ, operands, strict=True)))
    q, k, v, weight, forget, A_log, dt_bias = operands
    dense = (q, k, v, weight, forget, _dense(A_log), _dense(dt_bias))
    return pool_launches.steps(dense, pool, Slots(indices, out_indices, accepted, seed))


def _gather(pool: Tensor, indices: Tensor, has_initial_state: Tensor | None, dims: Sequence[int]) -> Tensor:
    return pool_launches.gather(pool, indices, has_initial_state, dims)


def _scatter(state: Tensor, indices: Tensor, seed: Tensor | None, dims: Sequence[int], pool: Tensor) -> None:
    memory.check_written("m2rnn", "pool", pool, {"state": state})
    pool_launches.scatter(state.contiguous(), pool, indices, seed, dims)


def _scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, first, cu_seqlens, host, indices, seed, every, deterministic, pool = arguments
    memory.check_written("m2rnn", "pool", pool, dict(zip(_READ, given, strict=True)))
    q, k, v, weight, forget, A_log, dt_bias = given
    operands = (q, k, v, weight, forget, _dense(A_log), _dense(dt_bias))
    offsets = _dense(cu_seqlens)
    y, last, checkpoints = launches.forward(operands, first.contiguous(), offsets, True, deterministic, None, host)
    if checkpoints is not None and indices.numel():
        plan = launch_plan.plan_of(dispatch.kernels_for(*operands[:6], offsets))
        steps = q.shape[1] if offsets is None else q.shape[0]
        found = pool_launches.Forward(last, checkpoints, plan.interval, offsets, steps)
        dims = pool_launches.dims_of(*operands[:5])
        pool_launches.keep(found, pool, pool_launches.Kept(indices, every, seed), dims)
    return y, last


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def _without_gradients(operator: Any) -> Callable[..., Any]:
    """Return what the operator does at torch's Autograd key: nothing is differentiated."""

    def autograd(*arguments: Any) -> Any:
        transforms.refuse_tangents("m2rnn with a pool", arguments)
        if transforms.wants_gradient(arguments):
            raise RuntimeError("m2rnn with a pool: operands must not require a gradient; call under torch.no_grad()")
        with transforms.below():
            return operator(*arguments)

    return autograd


def _mapped(operator: Any) -> Callable[..., Any]:
    """Return the operator's rule for torch.vmap: a pool that is written has the mapped dim, too."""
    written = operator._schema.arguments[-1].alias_info is not None

    def rule(info: transforms.MapInfo, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        if written and in_dims[-1] is None:
            raise RuntimeError("m2rnn with a pool: the pool must be mapped by vmap where another operand is")
        if operator._schema.returns:
            return transforms.one_by_one(operator)(info, in_dims, *arguments)
        for i in range(info.batch_size):
            pairs = zip(arguments, in_dims, strict=True)
            operator(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in pairs))
        return None, None

    return rule


def _fake_steps(*arguments: Any) -> Tensor:
    q, v, pool = arguments[0], arguments[2], arguments[-1]
    y: Tensor = v.new_empty(*q.shape[:-2], pool.shape[1], v.shape[-1])
    return y


def _fake_gather(pool: Tensor, indices: Tensor, *_: Any) -> Tensor:
    return pool.new_empty(indices.shape[0], *pool.shape[1:], dtype=torch.float32)


def _fake_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    v, first, pool = arguments[2], arguments[7], arguments[-1]
    return v.new_empty(*v.shape[:-2], pool.shape[1], v.shape[-1]), first.new_empty(first.shape)


def _fake_scatter(*_: Any) -> None:
    """Return nothing, as the operator does."""


def _flops(q: Tensor, *arguments: Any, **_: Any) -> int:
    """Count H W, k v^T and H^T q of every token and head."""
    pool: Tensor = arguments[-1]
    return 2 * math.prod(q.shape[:-2]) * math.prod(pool.shape[1:]) * (pool.shape[-1] + 2)


def _no_flops(*_: Any, **__: Any) -> int:
    """Count nothing: states are only copied."""
    return 0
