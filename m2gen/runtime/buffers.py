"""Buffers that kernels write, and what becomes of those that several programs contribute to."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from . import launch_plan, relaunch
from .launch_plan import LaunchPlan, PerStep
from .relaunch import Known, Launched

Operands: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""q, k, v, weight, forget, A_log and dt_bias."""


Buffers: TypeAlias = tuple[Tensor | None, ...]
"""What the backward writes, in the order of its parameters: dq, dk, dv, dw, df, dA_log, ddt_bias, dh0."""


def rows(q: Tensor, lead: Sequence[int], out: PerStep, dtype: torch.dtype, atomic: bool) -> Tensor:
    """Return what programs write a result to: elements, float32 zeros to add to, or a float32 row a contributor."""
    heads, contributors, dims = out
    if contributors == 1:
        return q.new_empty(*lead, heads, *dims, dtype=dtype)
    if atomic:
        return q.new_zeros(*lead, heads, *dims, dtype=torch.float32)
    return q.new_empty(*lead, heads, contributors, *dims, dtype=torch.float32)


def finished(
    kernels: ModuleType, out: PerStep, buffer: Tensor, dtype: torch.dtype, atomic: bool, known: Known | None = None
) -> Tensor:
    """Return the result of what programs wrote to a buffer from ``rows``."""
    if out.contributors == 1:
        return buffer
    if atomic:
        return buffer.to(dtype)
    if out.dims:
        return summed(kernels, buffer, dtype, known)
    return summed(kernels, buffer.unsqueeze(-1), dtype, known).squeeze(-1)


def summed(kernels: ModuleType, buffer: Tensor, dtype: torch.dtype, known: Known | None = None) -> Tensor:
    """Sum (..., contributors, dim) float32 rows to (..., dim) of ``dtype``, in order; ``known`` as for ``forward``."""
    again = None if known is None else known.get("sum")
    if again is not None:
        out = buffer.new_empty(*again.call, dtype=dtype)
        again.launch((buffer, out))
        return out
    *lead, contributors, dim = buffer.shape
    out = buffer.new_empty(*lead, dim, dtype=dtype)
    if elements := out.numel():
        plan = launch_plan.plan_of(kernels)
        programs = (elements + plan.sum_block - 1) // plan.sum_block
        compiled = kernels.m2rnn_sum_kernel[(programs, 1, 1)](
            buffer, out, elements, CONTRIBUTORS=contributors, DIM=dim, **plan.forward_options
        )
        if known is not None:
            launched = Launched(compiled, programs, (elements, contributors, dim), buffer.get_device())
            relaunch.keep(known, "sum", launched, tuple(out.shape))
    return out


def allocated(
    plan: LaunchPlan, operands: Operands, batch: int, wanted: Sequence[bool], atomic: bool, segmented: bool
) -> Buffers:
    """Return buffers for the ``wanted`` gradients, and for what segments hand to each other."""
    q, k, v, _, forget, _, _ = operands
    lead = q.shape[:-2]
    want_q, want_k, want_v, want_w, want_f, want_A_log, want_dt_bias, want_h = wanted
    dA_log = ddt_bias = None
    if plan.computes_gate and (want_A_log or want_dt_bias):
        dA_log, ddt_bias = q.new_empty(2, batch, *plan.gate, dtype=torch.float32)
    return (
        rows(q, lead, plan.dq, q.dtype, atomic) if want_q else None,
        rows(q, lead, plan.dk, k.dtype, atomic) if want_k else None,
        rows(q, lead, plan.dv, v.dtype, atomic) if want_v else None,
        q.new_empty(batch, *plan.weight, dtype=torch.float32) if want_w else None,
        rows(q, lead, plan.df, forget.dtype, atomic) if want_f else None,
        dA_log,
        ddt_bias,
        q.new_empty(batch, *plan.state, dtype=torch.float32) if want_h or segmented else None,
    )


def gradients(
    kernels: ModuleType, operands: Operands, written: Buffers, wanted: Sequence[bool], atomic: bool
) -> list[Tensor]:
    """Return the ``wanted`` gradients, in the order of operands and then the initial state."""
    plan = launch_plan.plan_of(kernels)
    q, k, v, weight, forget, _, _ = operands
    dq, dk, dv, dw, df, dA_log, ddt_bias, dh0 = written
    every = (
        None if dq is None else finished(kernels, plan.dq, dq, q.dtype, atomic),
        None if dk is None else finished(kernels, plan.dk, dk, k.dtype, atomic),
        None if dv is None else finished(kernels, plan.dv, dv, v.dtype, atomic),
        None if dw is None else dw.sum((0, 2)).to(weight.dtype),
        None if df is None else finished(kernels, plan.df, df, forget.dtype, atomic),
        None if dA_log is None or not wanted[5] else dA_log.sum((0, 2)),
        None if ddt_bias is None or not wanted[6] else ddt_bias.sum((0, 2)),
        dh0 if wanted[7] else None,
    )
    return [gradient for gradient in every if gradient is not None]
