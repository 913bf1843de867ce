"""Everything that changes only how a kernel runs: the knobs, their defaults, and the one validity predicate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from m2gen.device import Device
from m2gen.errors import ScheduleError
from m2gen.spec import Dtype, TanhMode
from m2gen.variant import MIN_TILE, Variant


class Tanh(StrEnum):
    """How tanh is computed."""

    PTX = "ptx"
    """``tanh.approx.f32``: one special-function instruction, relative error 2^-11; NVIDIA only."""
    EXP = "exp"
    """From ``exp2`` with a series near 0: float32 accuracy everywhere, also in the interpreter."""


HOPPER = "sm_90"
"""The one architecture that has ``wgmma``."""
WARPGROUP_ROWS, WARPGROUP_WARPS = 64, 4
"""Of a product that a warpgroup makes."""
WARPGROUP_OPERANDS = 44_160
"""Bytes of shared memory that a backward of a warpgroup needs beside its states: three operands of products, an
interval's vectors, and sums of warps."""
WARPGROUP_INTERVAL = 12
"""As many states as fit beside them."""

USUAL_INTERVAL = 16
"""Steps between checkpoints of other defaults."""
SHORTEST_SEGMENT = 128
"""Steps below which a program's beginning takes much of its time. Fewer than the problems by which a schedule is tuned
have, so that the kernels that are timed are those that were verified."""
MOST_SEGMENTS = 64
"""Above which nothing is left of a last turn that could be saved."""


class Layouts(StrEnum):
    """Who decides which thread holds which element of a kernel's tensors."""

    AUTO = "auto"
    """Triton's compiler: the portable templates."""
    EXPLICIT = "explicit"
    """The templates, in Gluon: operands are loaded into the layouts of the products, and move through no shared memory.
    Products of 16-bit operands on NVIDIA only. A NaN or an infinity in k or v may reach the y of the same iteration's
    earlier steps, since one product makes every step's k v^T."""
    WARPGROUP = "warpgroup"
    """Explicit ones, and products by ``wgmma``: four warps of 16 rows each, right operands in shared memory, where an
    interval's vectors are loaded together. States of 64 columns on Hopper only. What explicit layouts may do with a NaN
    or an infinity in k or v, these may within an interval."""

    @property
    def written(self) -> bool:
        """Whether the templates say which thread holds what."""
        return self is not Layouts.AUTO


class Reduction(StrEnum):
    """How contributions of several programs to one element are summed."""

    ATOMIC = "atomic"
    """float32 atomics into a zeroed buffer: least memory; the order, so the last bits, may vary."""
    PARTIAL = "partial"
    """One float32 row a contributor, summed afterwards: deterministic; memory grows with the contributors."""


class Scratch(StrEnum):
    """Where the backward keeps the states of an interval that it has rebuilt."""

    L2 = "l2"
    """A buffer in global memory, one interval a program, which the L2 holds."""
    SHARED = "shared"
    """Shared memory; with explicit layouts only, whose threads read back what they wrote. It limits programs an SM."""


@dataclass(frozen=True)
class ForwardSchedule:
    """How the forward kernel runs."""

    rows: int
    """Rows of the state that one program holds; rows never mix, so K splits freely."""
    warps: int
    unroll: int
    """Steps an iteration; their operands are loaded one iteration ahead."""
    reduction: Reduction

    def parts(self, variant: Variant) -> int:
        """Return how many programs share one head's state."""
        return variant.padded_rows // self.rows

    @property
    def slug(self) -> str:
        return f"f{self.rows}x{self.warps}u{self.unroll}{self.reduction[0]}"


@dataclass(frozen=True)
class BackwardSchedule:
    """How the backward kernel runs."""

    rows: int
    warps: int
    chunk: int
    """Steps whose states live in registers between their recomputation and their gradients."""
    reduction: Reduction
    scratch: Scratch = Scratch.L2

    def parts(self, variant: Variant) -> int:
        """Return how many programs share one head's state."""
        return variant.padded_rows // self.rows

    @property
    def slug(self) -> str:
        shared = "s" if self.scratch is Scratch.SHARED else ""
        return f"b{self.rows}x{self.warps}c{self.chunk}{self.reduction[0]}{shared}"


Part = ForwardSchedule | BackwardSchedule


@dataclass(frozen=True)
class Schedule:
    """One way to run a variant, forward and backward, coupled by the checkpoint interval."""

    forward: ForwardSchedule
    backward: BackwardSchedule
    interval: int
    """Steps between the states that the forward saves. Above ``chunk``, the backward rebuilds the states of one
    interval into a scratch, ``chunk`` steps apart."""
    tanh: Tanh
    layouts: Layouts = Layouts.AUTO
    segments: int = 1
    """Parts of a sequence's walk, each a program that goes on from the state of the one before it. Where programs take
    turns, since the GPU does not hold all of them at once, much of it may be idle during the last one, which is shorter
    if programs are. Bits are those of one part."""

    @property
    def two_level(self) -> bool:
        """Whether the backward rebuilds states into a scratch, rather than loading every chunk's checkpoint."""
        return self.interval > self.backward.chunk

    def scratch_bytes(self, variant: Variant) -> int:
        """Return what one program's scratch takes, wherever it is."""
        if not self.two_level:
            return 0
        states = self.interval // self.backward.chunk
        if self.layouts is Layouts.WARPGROUP:
            states -= 1  # the last one is in registers
        return states * self.backward.rows * variant.padded_cols * 4

    def laid_out(self, layouts: Layouts) -> Schedule:
        """Return the schedule with other layouts, and what they can have: a scratch, the tiles of a warpgroup."""
        if layouts is self.layouts:
            return self
        forward, backward, interval = self.forward, self.backward, self.interval
        if Layouts.WARPGROUP in (layouts, self.layouts):
            group = layouts is Layouts.WARPGROUP
            rows, warps = WARPGROUP_ROWS if group else MIN_TILE, WARPGROUP_WARPS
            forward = replace(forward, rows=rows, warps=warps, unroll=1 if group else 4)
            backward = replace(backward, rows=rows, warps=warps, chunk=1 if group else 2, scratch=Scratch.SHARED)
            interval = WARPGROUP_INTERVAL if group else USUAL_INTERVAL
        if not layouts.written:
            backward = replace(backward, scratch=Scratch.L2)
        segments = 1 if layouts is Layouts.WARPGROUP else self.segments
        return Schedule(forward, backward, interval, self.tanh, layouts, segments)

    @property
    def shortest_segment(self) -> int:
        """Fewest steps that are a program of their own: whole intervals."""
        return -(-SHORTEST_SEGMENT // self.interval) * self.interval

    @property
    def slug(self) -> str:
        """Name the schedule as an identifier, for file names and tables."""
        layouts = f"_{self.layouts}" if self.layouts.written else ""
        segments = f"_s{self.segments}" if self.segments > 1 else ""
        return f"{self.forward.slug}_{self.backward.slug}_i{self.interval}{segments}_{self.tanh}{layouts}"


_SLUG = re.compile(
    r"f(\d+)x(\d+)u(\d+)([ap])_b(\d+)x(\d+)c(\d+)([ap])(s?)_i(\d+)(?:_s(\d+))?_(ptx|exp)(?:_(explicit|warpgroup))?"
)


def parse(slug: str) -> Schedule:
    """Return the schedule that ``Schedule.slug`` named; raises ``ScheduleError`` for any other text."""
    found = _SLUG.fullmatch(slug)
    if found is None:
        raise ScheduleError(f"a schedule must be named as f32x1u4a_b32x1c2a_i16_ptx is, got {slug!r}")
    reduction = {str(kind)[0]: kind for kind in Reduction}
    forward = ForwardSchedule(int(found[1]), int(found[2]), int(found[3]), reduction[found[4]])
    scratch = Scratch.SHARED if found[9] else Scratch.L2
    backward = BackwardSchedule(int(found[5]), int(found[6]), int(found[7]), reduction[found[8]], scratch)
    layouts = Layouts(found[13] or Layouts.AUTO)
    return Schedule(forward, backward, int(found[10]), Tanh(found[12]), layouts, int(found[11] or 1))


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def most_warps(variant: Variant, part: Part) -> int:
    """Return how many warps have a 16 x 8 tile of a product of their own.

    More would hold copies. Explicit backward kernels count on there being none: their threads read back from a
    scratch in the L2 what they wrote themselves, with no barrier.
    """
    return max(1, part.rows // MIN_TILE * (variant.padded_cols // 8))


def _problems(variant: Variant, schedule: Schedule, device: Device) -> Iterator[str]:
    for direction, part in (("forward", schedule.forward), ("backward", schedule.backward)):
        if not (_power_of_two(part.rows) and MIN_TILE <= part.rows <= variant.padded_rows):
            yield f"{direction}.rows must be a power of two from {MIN_TILE} to {variant.padded_rows}, got {part.rows}"
        if not (_power_of_two(part.warps) and part.warps <= 8):
            yield f"{direction}.warps must be 1, 2, 4 or 8, got {part.warps}"
    if not 1 <= schedule.forward.unroll <= 16:
        yield f"forward.unroll must be from 1 to 16, got {schedule.forward.unroll}"
    if not 1 <= schedule.backward.chunk <= 16:
        yield f"backward.chunk must be from 1 to 16, got {schedule.backward.chunk}"
    for name, steps in (("forward.unroll", schedule.forward.unroll), ("backward.chunk", schedule.backward.chunk)):
        if schedule.interval < 1 or steps < 1 or schedule.interval % steps:
            yield f"interval must be a multiple of {name} = {steps}, got {schedule.interval}"
    if not 1 <= schedule.segments <= MOST_SEGMENTS:
        yield f"segments must be from 1 to {MOST_SEGMENTS}, got {schedule.segments}"
    if schedule.segments > 1 and schedule.layouts is Layouts.WARPGROUP:
        yield f"segments must be 1 for layouts {schedule.layouts}, got {schedule.segments}"
    if schedule.layouts.written and not (device.is_nvidia and variant.dtype is not Dtype.FP32):
        yield f"layouts must be auto for {variant.dtype} on {device.arch}, got {schedule.layouts}"
    for direction, part in (("forward", schedule.forward), ("backward", schedule.backward)):
        most = most_warps(variant, part)
        if schedule.layouts.written and part.warps > most:
            each = "each with a 16 x 8 tile, for explicit layouts"
            yield f"{direction}.warps must be at most {most}, {each}, got {part.warps}"
    if schedule.layouts is Layouts.WARPGROUP:
        yield from _warpgroup_problems(variant, schedule, device)
    if schedule.backward.scratch is Scratch.SHARED:
        yield from _shared_problems(variant, schedule, device)
    if schedule.tanh is Tanh.PTX and not device.is_nvidia:
        yield f"tanh must be exp on {device.arch}, got {schedule.tanh}"
    if schedule.tanh is Tanh.PTX and variant.tanh is TanhMode.EXACT:
        yield f"tanh must be exp where the spec asks for exact, got {schedule.tanh}"


def _warpgroup_problems(variant: Variant, schedule: Schedule, device: Device) -> Iterator[str]:
    if device.arch != HOPPER:
        yield f"layouts must be auto or explicit on {device.arch}, got {schedule.layouts}"
    if variant.padded_cols != WARPGROUP_ROWS:
        yield f"layouts must be auto or explicit unless V is from 33 to 64, got {schedule.layouts}"
    forward, backward = schedule.forward, schedule.backward
    tile = (WARPGROUP_ROWS, WARPGROUP_WARPS, 1)
    if (forward.rows, forward.warps, forward.unroll) != tile:
        yield f"forward must have 64 rows, 4 warps and unroll 1 for layouts {schedule.layouts}, got {forward.slug}"
    if (backward.rows, backward.warps, backward.chunk) != tile or backward.scratch is not Scratch.SHARED:
        needed = "64 rows, 4 warps, chunk 1 and a shared scratch"
        yield f"backward must have {needed} for layouts {schedule.layouts}, got {backward.slug}"


def _shared_problems(variant: Variant, schedule: Schedule, device: Device) -> Iterator[str]:
    if schedule.layouts is Layouts.AUTO:
        yield f"backward.scratch must be l2 for layouts auto, got {schedule.backward.scratch}"
    if not schedule.two_level:
        limit = f"unless interval is above backward.chunk = {schedule.backward.chunk}"
        yield f"backward.scratch must be l2 {limit}, got {schedule.backward.scratch}"
    taken = schedule.scratch_bytes(variant) + (schedule.layouts is Layouts.WARPGROUP) * WARPGROUP_OPERANDS
    if taken > device.shared_bytes:
        yield f"backward.scratch must take at most {device.shared_bytes} bytes of shared memory, got {taken}"


def problems(variant: Variant, schedule: Schedule, device: Device) -> tuple[str, ...]:
    """Return why ``schedule`` cannot serve ``variant`` on ``device``; empty when it can."""
    return tuple(_problems(variant, schedule, device))


def check(variant: Variant, schedule: Schedule, device: Device) -> Schedule:
    """Return ``schedule``, or raise ``ScheduleError`` with every reason why it is not valid."""
    reasons = problems(variant, schedule, device)
    if reasons:
        raise ScheduleError(f"{variant.key} on {device.arch}: {'; '.join(reasons)}")
    return schedule
