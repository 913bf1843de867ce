"""Estimate what one call allocates beyond its operands, their gradients and y, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from m2gen.kernels.lowering import Lowering
from m2gen.kernels.outputs import Output
from m2gen.schedule import Reduction

SINGLE = 4
"""Bytes of a float32, the element type of every buffer between kernels."""


@dataclass(frozen=True)
class MemoryBound:
    """Maximum memory of a call: ``size`` or ``times``; no bound if both are None.

    The bound applies twice: to the estimate of what lies beyond inputs, gradients and y, before anything runs; and to
    the measured peak beyond the inputs, which includes the gradients and y.
    """

    size: int | None = None
    """Maximum in bytes."""
    times: float | None = None
    """Maximum as a multiple of the default schedule's memory."""


USUAL = MemoryBound(times=1.5)
"""The default bound. Every layer of a model holds its checkpoints from its forward to its backward, so a schedule that
is a tenth faster with five times the checkpoints, as interval 2 is for the 7B layer, may not fit where the default
does."""


def extra_bytes(k: Lowering, batch: int, seq: int, *, training: bool) -> int:
    """Return the bytes of checkpoints, partial sums and scratch of a forward, and with ``training`` of a backward."""
    variant, schedule = k.variant, k.schedule
    tokens, heads = batch * seq, variant.total_heads
    state = heads * variant.state_expansion * variant.head_dim * SINGLE
    total = _buffer(k.y, schedule.forward.reduction, tokens)
    if not training:
        return total
    total += batch * -(-seq // schedule.interval) * (state // SINGLE * schedule.checkpoint_bytes(variant))
    total += sum(_buffer(out, schedule.backward.reduction, tokens) for out in k.gradients)
    if schedule.segments > 1 and seq > schedule.shortest_segment:
        total += batch * state  # the gradients that one segment hands to another
    scratch = k.launch.backward_programs * k.launch.scratch_elements
    return total + batch * (prod(k.launch.weight_shape) + scratch) * SINGLE


def _buffer(out: Output, reduction: Reduction, tokens: int) -> int:
    """Return the bytes of the float32 buffer of an output that several programs contribute to."""
    if not out.shared:
        return 0
    rows = 1 if reduction is Reduction.ATOMIC else out.contributors
    return tokens * out.groups * rows * (out.dim or 1) * SINGLE
