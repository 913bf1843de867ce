"""Launch the kernels of a module on operands, as the module's ``LAUNCH`` says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import buffers, launch_plan, relaunch
from .buffers import Operands
from .launch_plan import LaunchPlan
from .relaunch import Known, Launched


class ForwardCall(NamedTuple):
    """What the sizes of a forward's operands decide alone, whatever is in them."""

    steps: int
    intervals: int
    programs: int
    segmented: bool
    atomic: bool
    """Whether programs add to y."""
    lead: tuple[int, ...]
    state: tuple[int, ...]
    checkpoints: tuple[int, ...]


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
    plan, q, v = launch_plan.plan_of(kernels), operands[0], operands[2]
    again = None if known is None else known.get((save, deterministic))
    call: ForwardCall = forward_call(plan, q, cu_seqlens, deterministic) if again is None else again.call
    y = buffers.rows(q, call.lead, plan.y, v.dtype, call.atomic)
    final_state = q.new_empty(*call.state, dtype=torch.float32)
    checkpoints = q.new_empty(*call.checkpoints, dtype=getattr(torch, plan.checkpoints)) if save else None
    pointers = (
        *(operands if plan.computes_gate else operands[:5]), initial_state, y, final_state,
        checkpoints if save else final_state,  # not written to then
        cu_seqlens,
    )  # fmt: skip
    if plan.segments > 1:
        pointers = (*pointers, tickets_of(q, call.programs, call.segmented))
    if again is not None:
        again.launch(pointers)
    elif call.programs:
        scalars = (*_strides(operands, cu_seqlens), call.steps, call.intervals)
        flags = {"USE_INITIAL_STATE": initial_state is not None, "IS_VARLEN": cu_seqlens is not None, "SAVE": save}
        flags["ATOMIC"] = call.atomic
        if plan.segments > 1:
            flags["SEGMENTED"] = call.segmented
        programs = call.programs * (plan.segments if call.segmented else 1)
        compiled = kernels.m2rnn_forward_kernel[(programs, 1, 1)](
            *pointers, *scalars, **flags, **plan.forward_options
        )  # fmt: skip
        if known is not None:
            launched = Launched(compiled, programs, (*scalars, *flags.values()), q.get_device())
            relaunch.keep(known, (save, deterministic), launched, call)
    if plan.y.contributors > 1:
        y = buffers.finished(kernels, plan.y, y, v.dtype, call.atomic, known)
    return y, final_state, checkpoints


def forward_call(plan: LaunchPlan, q: Tensor, cu_seqlens: Tensor | None, deterministic: bool) -> ForwardCall:
    """Return what the sizes of a call decide."""
    batch, steps, intervals, count = sizes(plan, q, cu_seqlens)
    lead = (batch, steps) if cu_seqlens is None else (steps,)
    atomic = plan.forward_adds and not deterministic and math.prod(lead) > plan.short
    programs, segmented = batch * plan.forward_programs, in_segments(plan, batch, steps, cu_seqlens)
    return ForwardCall(
        steps, intervals, programs, segmented, atomic, lead, (batch, *plan.state), (count, *plan.state)
    )  # fmt: skip


def backward(
    kernels: ModuleType,
    dy: Tensor,
    dht: Tensor | None,
    operands: Operands,
    checkpoints: Tensor,
    cu_seqlens: Tensor | None,
    bound: float,
    wanted: Sequence[bool],
    deterministic: bool,
    known: Known | None = None,
) -> list[Tensor]:
    """Launch the backward kernel; return the ``wanted`` gradients: eight flags, for operands and the initial state.

    ``known`` keeps launches for calls that are alike in ``dy`` and ``wanted``, too.
    """
    plan, q = launch_plan.plan_of(kernels), operands[0]
    batch, steps, intervals, _ = sizes(plan, q, cu_seqlens)
    atomic = plan.backward_adds and not deterministic
    segmented = in_segments(plan, batch, steps, cu_seqlens)
    written = buffers.allocated(plan, operands, batch, wanted, atomic, segmented)
    programs = batch * plan.backward_programs
    tickets = (tickets_of(q, programs, segmented),) if plan.segments > 1 else ()
    scratch = q.new_empty(programs, plan.scratch, dtype=torch.float32) if plan.scratch else None
    if batch:
        given, results = (operands, written) if plan.computes_gate else (operands[:5], (*written[:5], written[7]))
        programs *= plan.segments if segmented else 1
        pointers = (*given, dy, dht, checkpoints, scratch, cu_seqlens, *tickets, *results)
        again = None if known is None else known.get("backward")
        if again is not None:
            again.launch(pointers)
        else:
            numbers = (*_strides(operands, cu_seqlens), *token_strides(dy, cu_seqlens), steps, intervals, bound)
            flags = {"USE_FINAL_STATE_GRADIENT": dht is not None, "IS_VARLEN": cu_seqlens is not None, "ATOMIC": atomic}
            flags |= _backward_flags(plan, operands, dy, wanted, segmented)
            kernel = kernels.m2rnn_backward_kernel
            compiled = kernel[(programs, 1, 1)](*pointers, *numbers, **flags, **plan.backward_options)
            if known is not None:
                ordered = (flags[name] for name in kernel.arg_names if name in flags)
                relaunch.keep(known, "backward", Launched(compiled, programs, (*numbers, *ordered), q.get_device()))
    return buffers.gradients(kernels, operands, written, wanted, atomic)


def step(kernels: ModuleType, operands: Operands, state: Tensor, known: Known | None = None) -> Tensor:
    """Launch the step kernel, which advances ``state`` in place; return y."""
    plan, v = launch_plan.plan_of(kernels), operands[2]
    again = None if known is None else known.get(())
    y = v.new_empty(*((v.shape[0], plan.y.heads, *plan.y.dims) if again is None else again.call))
    pointers = (*(operands if plan.computes_gate else operands[:5]), state, y)
    if again is not None:
        again.launch(pointers)
    elif programs := y.shape[0] * y.shape[1]:
        scalars = tuple(stride for x in (*operands[:5], state) for stride in x.stride())
        compiled = kernels.m2rnn_step_kernel[(programs, 1, 1)](*pointers, *scalars, **plan.forward_options)
        if known is not None:
            relaunch.keep(known, (), Launched(compiled, programs, scalars, v.get_device()), tuple(y.shape))
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


def in_segments(plan: LaunchPlan, batch: int, steps: int, cu_seqlens: Tensor | None) -> bool:
    """Whether scans may have several segments: not where a sequence, of a packed batch the mean one, is one at most.

    Most programs of short sequences would begin and find no segment to scan.
    """
    sequences = 1 if cu_seqlens is None else batch
    return plan.segments > 1 and batch > 0 and steps > sequences * plan.shortest_segment


def tickets_of(q: Tensor, programs: int, segmented: bool) -> Tensor | None:
    """Return a counter of the segments that programs took, then how many segments of each scan have ended."""
    return q.new_zeros(1 + programs, dtype=torch.int32) if segmented else None


def aligned(*tensors: Tensor) -> bool:
    """Whether every row of these tensors lies on 16 bytes, and offsets within an interval fit 32 bits."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(s % 16 == 0 and s < 1 << 27 for s in x.stride()[:-1])
        for x in tensors
    )


def token_strides(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Return x's strides by batch, step, head (and element); a packed batch has no batch dim."""
    return x.stride() if cu_seqlens is None else (0, *x.stride())


def _strides(operands: Operands, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    q, k, v, weight, forget, _, _ = operands
    return (
        *token_strides(q, cu_seqlens), *token_strides(k, cu_seqlens), *token_strides(v, cu_seqlens),
        *weight.stride(), *token_strides(forget, cu_seqlens),
    )  # fmt: skip


def _backward_flags(
    plan: LaunchPlan, operands: Operands, dy: Tensor, wanted: Sequence[bool], segmented: bool
) -> dict[str, bool]:
    """Return the backward kernel's flags for gradients that are wanted, and those that not every kernel has."""
    want_q, want_k, want_v, want_w, want_f, want_A_log, want_dt_bias, want_h = wanted
    flags = {
        "WANT_Q": want_q, "WANT_K": want_k, "WANT_V": want_v, "WANT_W": want_w, "WANT_F": want_f, "WANT_H": want_h,
        "CARRIES": any(wanted[1:]),
    }  # fmt: skip
    if plan.segments > 1:
        flags["SEGMENTED"] = segmented
    if plan.aligned:
        flags["ALIGNED"] = aligned(*operands[:3], dy)
    if plan.computes_gate:
        flags["WANT_GATE"] = want_A_log or want_dt_bias
    return flags
