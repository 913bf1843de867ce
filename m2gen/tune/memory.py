"""What one call allocates beyond its operands, their gradients and y: known before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from m2gen.kernels.lowering import Lowering
from m2gen.kernels.outputs import Output
from m2gen.schedule import Reduction

SINGLE = 4
"""Bytes of a float32, which every buffer between kernels holds."""


@dataclass(frozen=True)
class MemoryBound:
    """Most memory that a call may take: of the one that is set; no bound where none is.

    It holds twice: by arithmetic for what lies beyond inputs, gradients and y, before anything runs; and for the
    measured peak beyond the inputs, which has the gradients and y in it.
    """

    size: int | None = None
    """Bytes."""
    times: float | None = None
    """What the default schedule takes, that many times."""


USUAL = MemoryBound(times=1.5)
"""Every layer of a model holds its checkpoints from its forward to its backward: a schedule that is a tenth faster with
five times the checkpoints, as that of interval 2 is for the 7B layer, does not fit where the default does."""


def extra_bytes(k: Lowering, batch: int, seq: int, *, training: bool) -> int:
    """Return the bytes of checkpoints, partial sums and scratch of a forward call, and a backward with ``training``."""
    variant, schedule = k.variant, k.schedule
    tokens, heads = batch * seq, variant.total_heads
    state = heads * variant.state_expansion * variant.head_dim * SINGLE
    total = _buffer(k.y, schedule.forward.reduction, tokens)
    if not training:
        return total
    total += batch * -(-seq // schedule.interval) * state
    total += sum(_buffer(out, schedule.backward.reduction, tokens) for out in k.gradients)
    if schedule.segments > 1 and seq > schedule.shortest_segment:
        total += batch * state  # the gradients that one segment hands to another
    programs = batch * k.launch.backward_programs
    return total + programs * (variant.head_dim**2 + k.launch.scratch_elements) * SINGLE  # dW of each, and its scratch


def _buffer(out: Output, reduction: Reduction, tokens: int) -> int:
    """Return the bytes of the float32 buffer that several programs write an output to."""
    if not out.shared:
        return 0
    rows = 1 if reduction is Reduction.ATOMIC else out.contributors
    return tokens * out.groups * rows * (out.dim or 1) * SINGLE
