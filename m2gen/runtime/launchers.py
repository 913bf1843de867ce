"""Launch the kernels of a module on operands, as the module's ``LAUNCH`` says."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import buffers, launch_plan, relaunch
from .buffers import Operands
from .launch_plan import LaunchPlan
from .relaunch import KernelLaunch, Known


def forward(
    kernels: ModuleType,
    operands: Operands,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    deterministic: bool,
    known: Known | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the forward kernel; return y, the final state and, if ``save``, the state every ``interval`` steps.

    ``known``, here and for ``step``, keeps launches for calls alike.
    """
    plan = launch_plan.plan_of(kernels)
    q, v, packed = operands[0], operands[2], cu_seqlens is not None
    batch, steps, intervals, count = sizes(plan, q, cu_seqlens)
    atomic = plan.forward_adds and not deterministic and (steps if packed else batch * steps) > plan.short
    y = buffers.rows(q, plan.y, v.dtype, atomic)
    final_state = q.new_empty((batch, *plan.state), dtype=torch.float32)
    checkpoints = q.new_empty((count, *plan.state), dtype=getattr(torch, plan.checkpoints)) if save else None
    saved = final_state if checkpoints is None else checkpoints  # not written to then
    pointers = (*_given(plan, operands), initial_state, y, final_state, saved, cu_seqlens)
    programs = batch * plan.forward_programs
    segmented = in_segments(plan, batch, steps)
    if plan.segments > 1:
        pointers = (*pointers, turns_of(q, programs, segmented))
    again = None if known is None else known.get((save, deterministic))
    if again is not None:
        again(pointers)
    elif batch:
        scalars = (*_strides(operands, packed), steps, intervals)
        flags = {"HAS_FIRST": initial_state is not None, "PACKED": packed, "SAVE": save, "ATOMIC": atomic}
        flags |= _segments(plan, segmented)
        launched = KernelLaunch(
            kernels.m2rnn_forward_kernel, _programs(plan, programs, segmented), scalars, flags, plan.forward_options
        )
        relaunch.launch(launched, pointers, known, (save, deterministic))
    return buffers.finished(kernels, plan.y, y, v.dtype, atomic, known), final_state, checkpoints


def backward(
    kernels: ModuleType,
    dy: Tensor,
    dh_last: Tensor | None,
    operands: Operands,
    checkpoints: Tensor,
    cu_seqlens: Tensor | None,
    bound: float,
    wanted: Sequence[bool],
    deterministic: bool,
) -> list[Tensor]:
    """Launch the backward kernel; return the ``wanted`` gradients: eight flags, for operands and the initial state."""
    plan = launch_plan.plan_of(kernels)
    q, packed = operands[0], cu_seqlens is not None
    batch, steps, intervals, _ = sizes(plan, q, cu_seqlens)
    atomic = plan.backward_adds and not deterministic
    segmented = in_segments(plan, batch, steps)
    written = buffers.allocated(plan, operands, batch, wanted, atomic, segmented)
    programs = batch * plan.backward_programs
    turns = (turns_of(q, programs, segmented),) if plan.segments > 1 else ()
    scratch = q.new_empty((programs, plan.scratch), dtype=torch.float32) if plan.scratch else None
    if batch:
        results = written if plan.computes_gate else (*written[:5], written.dh_first)
        pointers = (*_given(plan, operands), dy, dh_last, checkpoints, scratch, cu_seqlens, *turns, *results)
        scalars = (*_strides(operands, packed), *token_strides(dy, packed), steps, intervals, bound)
        flags = {"HAS_LAST": dh_last is not None, "PACKED": packed, "ATOMIC": atomic, **_asked(plan, wanted)}
        if plan.aligned:
            flags["ALIGNED"] = aligned(*operands[:3], dy)
        flags |= _segments(plan, segmented)
        launched = KernelLaunch(
            kernels.m2rnn_backward_kernel, _programs(plan, programs, segmented), scalars, flags, plan.backward_options
        )
        relaunch.launch(launched, pointers)
    return buffers.gradients(kernels, operands, written, wanted, atomic)


def step(kernels: ModuleType, operands: Operands, state: Tensor, known: Known | None = None) -> Tensor:
    """Launch the step kernel, which advances ``state`` in place; return y."""
    plan = launch_plan.plan_of(kernels)
    batch, heads = operands[0].shape[0], plan.y.heads
    y = operands[2].new_empty((batch, heads, *plan.y.dims))
    pointers = (*_given(plan, operands), state, y)
    again = None if known is None else known.get(())
    if again is not None:
        again(pointers)
    elif batch:
        scalars = tuple(stride for x in (*operands[:5], state) for stride in x.stride())
        launched = KernelLaunch(kernels.m2rnn_step_kernel, batch * heads, scalars, {}, plan.forward_options)
        relaunch.launch(launched, pointers, known, ())
    return y


def sizes(plan: LaunchPlan, q: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """Return sequences, steps (tokens of a packed batch), and checkpoints: of a sequence (a packed batch), of all."""
    if cu_seqlens is None:
        batch, steps = q.shape[:2]
        intervals = (steps + (plan.interval - 1)) // plan.interval
        return batch, steps, intervals, batch * intervals
    batch, steps = cu_seqlens.shape[0] - 1, q.shape[0]
    intervals = steps // plan.interval + batch
    return batch, steps, intervals, intervals


def in_segments(plan: LaunchPlan, batch: int, steps: int) -> bool:
    """Whether scans may have several segments: not where all steps, of a packed batch together, are one at most."""
    return plan.segments > 1 and batch > 0 and steps > plan.shortest_segment


def turns_of(q: Tensor, programs: int, segmented: bool) -> Tensor | None:
    """Return a counter of the segments that programs took, then how many segments of each scan have ended."""
    return q.new_zeros(1 + programs, dtype=torch.int32) if segmented else None


def aligned(*tensors: Tensor) -> bool:
    """Whether every row of these tensors lies on 16 bytes, and offsets within an interval fit 32 bits."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(s % 16 == 0 and s < 1 << 27 for s in x.stride()[:-1])
        for x in tensors
    )


def token_strides(x: Tensor, packed: bool) -> tuple[int, ...]:
    """Return x's strides by batch, step, head (and element); a packed batch has no batch dim."""
    return (0, *x.stride()) if packed else x.stride()


def _strides(operands: Operands, packed: bool) -> tuple[int, ...]:
    q, k, v, weight, forget, _, _ = operands
    return (
        *token_strides(q, packed), *token_strides(k, packed), *token_strides(v, packed), *weight.stride(),
        *token_strides(forget, packed),
    )  # fmt: skip


def _given(plan: LaunchPlan, operands: Operands) -> tuple[Tensor | None, ...]:
    """Return the operands that are parameters of the kernels."""
    return operands if plan.computes_gate else operands[:5]


def _segments(plan: LaunchPlan, segmented: bool) -> dict[str, bool]:
    return {"SEGMENTED": segmented} if plan.segments > 1 else {}


def _programs(plan: LaunchPlan, scans: int, segmented: bool) -> int:
    return scans * plan.segments if segmented else scans


def _asked(plan: LaunchPlan, wanted: Sequence[bool]) -> dict[str, bool]:
    """Return the backward kernel's flags for which gradients are wanted, of those of all operands and the state."""
    want_q, want_k, want_v, want_w, want_f, want_A_log, want_dt_bias, want_h = wanted
    flags = {"WANT_Q": want_q, "WANT_K": want_k, "WANT_V": want_v, "WANT_W": want_w, "WANT_F": want_f}
    flags |= {"WANT_H": want_h, "CARRIES": any(wanted[1:])}
    return flags | {"WANT_GATE": want_A_log or want_dt_bias} if plan.computes_gate else flags
