"""What a module of kernels says of how it is launched."""

from __future__ import annotations

from m2gen.kernels.launch import SHORT
from m2gen.kernels.lowering import Direction, Lowering
from m2gen.kernels.options import options_of
from m2gen.runtime.launch_plan import LaunchPlan


def launch_plan(k: Lowering) -> LaunchPlan:
    """Return all that the launchers of the runtime must know of these kernels."""
    schedule, numbers = k.schedule, k.launch
    return LaunchPlan(
        computes_gate=k.computes_gate,
        interval=schedule.interval,
        checkpoints=k.checkpoint_dtype,
        forward_programs=numbers.forward_programs,
        backward_programs=numbers.backward_programs,
        segments=schedule.segments,
        shortest_segment=schedule.shortest_segment if k.segmented else 0,
        state=numbers.state_shape,
        weight=numbers.weight_shape,
        gate=numbers.gate_shape,
        scratch=numbers.scratch_elements,
        y=k.y.per_step,
        dq=k.gradients.dq.per_step,
        dk=k.gradients.dk.per_step,
        dv=k.gradients.dv.per_step,
        df=k.gradients.df.per_step,
        forward_adds=k.forward_adds,
        backward_adds=k.backward_adds,
        short=SHORT,
        aligned=k.warps_have_slots,
        sum_block=numbers.sum_block,
        forward_options=options_of(k, Direction.FORWARD),
        backward_options=options_of(k, Direction.BACKWARD),
    )
