"""Buffers that kernels write, and what becomes of those that several programs contribute to."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import launch_plan, relaunch
from .launch_plan import LaunchPlan, PerStep
from .relaunch import KernelLaunch, Known

Operands: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""q, k, v, weight, forget, A_log and dt_bias."""


class Buffers(NamedTuple):
    """What the backward writes, in the order of its parameters; None for what nobody wants."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dw: Tensor | None
    df: Tensor | None
    dA_log: Tensor | None
    ddt_bias: Tensor | None
    dh_first: Tensor | None


def rows(q: Tensor, out: PerStep, dtype: torch.dtype, atomic: bool) -> Tensor:
    """Return a buffer for a result of every step of q: float32 with several contributors, zeros to add to if atomic."""
    lead = q.shape[:-2]
    if out.contributors == 1:
        return q.new_empty((*lead, out.heads, *out.dims), dtype=dtype)
    if atomic:
        return q.new_zeros((*lead, out.heads, *out.dims), dtype=torch.float32)
    return q.new_empty((*lead, out.heads, out.contributors, *out.dims), dtype=torch.float32)


def finished(
    kernels: ModuleType, out: PerStep, buffer: Tensor, dtype: torch.dtype, atomic: bool, known: Known | None = None
) -> Tensor:
    """Return the result of what ``rows`` allocated and a kernel wrote."""
    if out.contributors == 1:
        return buffer
    if atomic:
        return buffer.to(dtype)
    if out.dims:
        return summed(kernels, buffer, dtype, known)
    return summed(kernels, buffer.unsqueeze(-1), dtype, known).squeeze(-1)


def summed(kernels: ModuleType, buffer: Tensor, dtype: torch.dtype, known: Known | None = None) -> Tensor:
    """Sum (..., contributors, dim) float32 rows to (..., dim) of ``dtype``, in order; ``known`` as for ``launch``."""
    *lead, contributors, dim = buffer.shape
    out = buffer.new_empty((*lead, dim), dtype=dtype)
    again = None if known is None else known.get("sum")
    if again is not None:
        again((buffer, out))
    elif elements := out.numel():
        plan = launch_plan.plan_of(kernels)
        programs = -(-elements // plan.sum_block)
        flags = {"CONTRIBUTORS": contributors, "DIM": dim}
        launched = KernelLaunch(kernels.m2rnn_sum_kernel, programs, (elements,), flags, plan.forward_options)
        relaunch.launch(launched, (buffer, out), known, "sum")
    return out


def allocated(
    plan: LaunchPlan, operands: Operands, batch: int, wanted: Sequence[bool], atomic: bool, segmented: bool
) -> Buffers:
    """Return buffers for the ``wanted`` gradients, and for what segments hand to each other."""
    q, k, v, _, forget, _, _ = operands
    want_q, want_k, want_v, want_w, want_f, want_A_log, want_dt_bias, want_h = wanted
    dA_log = ddt_bias = None
    if plan.computes_gate and (want_A_log or want_dt_bias):
        dA_log, ddt_bias = q.new_empty((2, batch, *plan.gate), dtype=torch.float32)
    return Buffers(
        rows(q, plan.dq, q.dtype, atomic) if want_q else None,
        rows(q, plan.dk, k.dtype, atomic) if want_k else None,
        rows(q, plan.dv, v.dtype, atomic) if want_v else None,
        q.new_empty((batch, *plan.weight), dtype=torch.float32) if want_w else None,
        rows(q, plan.df, forget.dtype, atomic) if want_f else None,
        dA_log,
        ddt_bias,
        q.new_empty((batch, *plan.state), dtype=torch.float32) if want_h or segmented else None,
    )


def gradients(
    kernels: ModuleType, operands: Operands, written: Buffers, wanted: Sequence[bool], atomic: bool
) -> list[Tensor]:
    """Return the ``wanted`` gradients, in the order of operands and then the initial state."""
    plan = launch_plan.plan_of(kernels)

    def per_step(out: PerStep, buffer: Tensor | None, like: Tensor) -> Tensor | None:
        return None if buffer is None else finished(kernels, out, buffer, like.dtype, atomic)

    def summed_over_programs(buffer: Tensor | None) -> Tensor | None:
        return None if buffer is None else buffer.sum((0, 2))

    q, k, v, weight, forget, _, _ = operands
    dw = summed_over_programs(written.dw)
    every = (
        per_step(plan.dq, written.dq, q),
        per_step(plan.dk, written.dk, k),
        per_step(plan.dv, written.dv, v),
        None if dw is None else dw.to(weight.dtype),
        per_step(plan.df, written.df, forget),
        summed_over_programs(written.dA_log) if wanted[5] else None,
        summed_over_programs(written.ddt_bias) if wanted[6] else None,
        written.dh_first if wanted[7] else None,
    )
    return [gradient for gradient in every if gradient is not None]
