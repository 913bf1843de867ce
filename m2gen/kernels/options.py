"""The options by which Triton compiles and launches a kernel."""

from __future__ import annotations

from m2gen.kernels.lowering import Direction, Lowering
from m2gen.kernels.reductions import Sums
from m2gen.schedule.mma import SLOT_ROWS

MOST_REGISTERS = 255
"""Maximum registers per thread on NVIDIA GPUs."""


def options_of(k: Lowering, direction: Direction) -> dict[str, int]:
    """Return all options of one kernel.

    Products and sums are fused to one operation, which Triton did by itself before 3.10.
    """
    return {**scheduled_options(k, direction), "enable_fp_fusion": True}


def scheduled_options(k: Lowering, direction: Direction) -> dict[str, int]:
    """Return those of ``options_of`` that the schedule chooses.

    Two warps that share a program have 255 registers a thread: ptxas would spill to have more programs at once,
    though those that there are have all they need (docs/performance.md). With slots it would spill nothing, and keep
    fewer loads and products on their way: 0.97 ms of the 7B layer for 1.09. Warps of 16 rows are slower with more.
    """
    if direction == Direction.BACKWARD:
        return {"num_warps": k.backward.warps, "num_stages": 1}
    tall = k.forward_slots and k.slot_rows == SLOT_ROWS[0]
    bound = {"maxnreg": MOST_REGISTERS} if tall or k.sums.y is Sums.MEMORY else {}
    return {"num_warps": k.forward.warps, "num_stages": 1, **bound}
