"""The schedule that serves a variant until a tuned one does: what measurements say of shapes, with no search."""

from __future__ import annotations

from dataclasses import replace

from m2gen.device import Device
from m2gen.schedule.knobs import (
    HOPPER,
    USUAL_INTERVAL,
    WARPGROUP_ROWS,
    BackwardSchedule,
    ForwardSchedule,
    Layouts,
    Reduction,
    Schedule,
    Scratch,
    Tanh,
    check,
)
from m2gen.spec import Dtype, TanhMode
from m2gen.variant import MIN_TILE, Variant

MOST_EXPLICIT_COLS = 64
"""Columns up to which threads have registers for the state weight; a compiler that chooses layouts keeps it in shared
memory, where explicit ones spill 350 bytes a thread at 128."""


RESIDENT_WARPS = 8
"""That an SM of NVIDIA has registers for, with the 255 a thread that a backward takes."""


def _tile(variant: Variant, device: Device) -> tuple[int, int]:
    """Return rows and warps of a program: 32 rows of up to 16 columns, else 16 rows and a warp per 16 columns.

    Above 256 threads a program, a thread's share of the register file is too small for the widest states.
    """
    warps = min(variant.padded_cols // MIN_TILE, 256 // device.warp_size)
    return (min(variant.padded_rows, 32), 1) if warps == 1 else (MIN_TILE, warps)


MANY_HEADS = 16
"""From which on a batch gives most SMs a warpgroup, for tiles of 64 rows."""


def _fills_warpgroups(variant: Variant, device: Device) -> bool:
    heads = variant.total_heads * (variant.padded_rows // WARPGROUP_ROWS)
    narrow = variant.dtype is not Dtype.FP32
    return device.arch == HOPPER and narrow and variant.padded_cols == WARPGROUP_ROWS and heads >= MANY_HEADS


def default(variant: Variant, device: Device) -> Schedule:
    """Return the schedule that serves ``variant`` on ``device`` until a tuned one does.

    Measured on H200s and H100s (docs/performance.md). Operands of 16 bits on NVIDIA have explicit layouts up to 64
    columns, with which a step of the published layers takes 0.8 to 0.9 of the time. States of up to 16 columns: one
    warp and 32 rows, as rows are independent and a barrier between warps costs more than the arithmetic. Wider states:
    16 rows, and as many warps as keep the state weight's operands in registers. Loads four steps ahead cover their
    latency, and eight share the sums of y where registers and instructions are few; two steps of states are what the
    backward's registers hold (one where products of float32 take them). A checkpoint every 16 steps costs 4 % of the
    forward's time and a sixteenth of all states. States are rebuilt into shared memory, if that leaves an SM as many
    programs as its registers do: 3 to 5 % of a step. Of 64 columns on Hopper, where there are many heads: warpgroups,
    which take half the time if a batch gives every SM one, and 1.4 times as long if it gives one to a quarter.
    """
    rows, warps = _tile(variant, device)
    single = variant.dtype is Dtype.FP32
    tanh = Tanh.PTX if device.is_nvidia and variant.tanh is TanhMode.APPROX else Tanh.EXP
    explicit = device.is_nvidia and not single and variant.padded_cols <= MOST_EXPLICIT_COLS
    unroll = 2 if single and warps > 1 else 4
    if explicit and tanh is Tanh.PTX and (rows, warps) == (32, 1):
        unroll = 8
    forward = ForwardSchedule(rows, warps, unroll, Reduction.ATOMIC)
    backward = BackwardSchedule(rows, warps, 1 if single else 2, Reduction.ATOMIC)
    layouts = Layouts.EXPLICIT if explicit else Layouts.AUTO
    schedule = Schedule(forward, backward, USUAL_INTERVAL, tanh=tanh, layouts=layouts)
    if explicit and schedule.scratch_bytes(variant) * (RESIDENT_WARPS // warps) <= device.shared_bytes:
        schedule = replace(schedule, backward=replace(backward, scratch=Scratch.SHARED))
    if _fills_warpgroups(variant, device):
        schedule = schedule.laid_out(Layouts.WARPGROUP)
    return check(variant, schedule, device)
