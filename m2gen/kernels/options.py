"""The options by which Triton compiles and launches a kernel."""

from __future__ import annotations

from m2gen.kernels.lowering import Direction, Lowering
from m2gen.kernels.reductions import Sums

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
    though those that there are have all they need (docs/performance.md).
    """
    if direction == Direction.BACKWARD:
        return {"num_warps": k.backward.warps, "num_stages": 1}
    most = k.forward_registers or (MOST_REGISTERS if k.sums.y is Sums.MEMORY else 0)
    bound = {"maxnreg": most} if most else {}
    return {"num_warps": k.forward.warps, "num_stages": 1, **bound}
