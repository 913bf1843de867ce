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


class Layouts(StrEnum):
    """Who decides which thread holds which element of a kernel's tensors."""

    AUTO = "auto"
    """Triton's compiler: the portable templates."""
    EXPLICIT = "explicit"
    """The templates, in Gluon: operands are loaded into the layouts of the products, and move through no shared memory.
    Products of 16-bit operands on NVIDIA only. A NaN or an infinity in k or v may reach the y of the same iteration's
    earlier steps, since one product makes every step's k v^T."""


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

    @property
    def two_level(self) -> bool:
        """Whether the backward rebuilds states into a scratch, rather than loading every chunk's checkpoint."""
        return self.interval > self.backward.chunk

    def scratch_bytes(self, variant: Variant) -> int:
        """Return what one program's scratch takes, wherever it is."""
        if not self.two_level:
            return 0
        return self.interval // self.backward.chunk * self.backward.rows * variant.padded_cols * 4

    def laid_out(self, layouts: Layouts) -> Schedule:
        """Return the schedule with other layouts, and its scratch where they can have it."""
        scratch = self.backward.scratch if layouts is Layouts.EXPLICIT else Scratch.L2
        return replace(self, backward=replace(self.backward, scratch=scratch), layouts=layouts)

    @property
    def slug(self) -> str:
        """Name the schedule as an identifier, for file names and tables."""
        explicit = "_explicit" if self.layouts is Layouts.EXPLICIT else ""
        return f"{self.forward.slug}_{self.backward.slug}_i{self.interval}_{self.tanh}{explicit}"


_SLUG = re.compile(r"f(\d+)x(\d+)u(\d+)([ap])_b(\d+)x(\d+)c(\d+)([ap])(s?)_i(\d+)_(ptx|exp)(_explicit)?")


def parse(slug: str) -> Schedule:
    """Return the schedule that ``Schedule.slug`` named; raises ``ScheduleError`` for any other text."""
    found = _SLUG.fullmatch(slug)
    if found is None:
        raise ScheduleError(f"a schedule must be named as f32x1u4a_b32x1c2a_i16_ptx is, got {slug!r}")
    reduction = {str(kind)[0]: kind for kind in Reduction}
    forward = ForwardSchedule(int(found[1]), int(found[2]), int(found[3]), reduction[found[4]])
    scratch = Scratch.SHARED if found[9] else Scratch.L2
    backward = BackwardSchedule(int(found[5]), int(found[6]), int(found[7]), reduction[found[8]], scratch)
    layouts = Layouts.EXPLICIT if found[12] else Layouts.AUTO
    return Schedule(forward, backward, int(found[10]), Tanh(found[11]), layouts)


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
    if schedule.layouts is Layouts.EXPLICIT and not (device.is_nvidia and variant.dtype is not Dtype.FP32):
        yield f"layouts must be auto for {variant.dtype} on {device.arch}, got {schedule.layouts}"
    for direction, part in (("forward", schedule.forward), ("backward", schedule.backward)):
        most = most_warps(variant, part)
        if schedule.layouts is Layouts.EXPLICIT and part.warps > most:
            each = "each with a 16 x 8 tile, for explicit layouts"
            yield f"{direction}.warps must be at most {most}, {each}, got {part.warps}"
    if schedule.backward.scratch is Scratch.SHARED:
        yield from _shared_problems(variant, schedule, device)
    if schedule.tanh is Tanh.PTX and not device.is_nvidia:
        yield f"tanh must be exp on {device.arch}, got {schedule.tanh}"
    if schedule.tanh is Tanh.PTX and variant.tanh is TanhMode.EXACT:
        yield f"tanh must be exp where the spec asks for exact, got {schedule.tanh}"


def _shared_problems(variant: Variant, schedule: Schedule, device: Device) -> Iterator[str]:
    if schedule.layouts is Layouts.AUTO:
        yield f"backward.scratch must be l2 for layouts auto, got {schedule.backward.scratch}"
    if not schedule.two_level:
        limit = f"unless interval is above backward.chunk = {schedule.backward.chunk}"
        yield f"backward.scratch must be l2 {limit}, got {schedule.backward.scratch}"
    taken = schedule.scratch_bytes(variant)
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


def default(variant: Variant, device: Device) -> Schedule:
    """Return the schedule that serves ``variant`` on ``device`` until a tuned one does.

    Measured on an H200 and H100s (docs/performance.md). Operands of 16 bits on NVIDIA have explicit layouts up to 64
    columns, with which a step of the published layers takes 0.8 to 0.9 of the time. States of up to 16 columns: one
    warp and 32 rows, as rows are independent and a barrier between warps costs more than the arithmetic. Wider states:
    16 rows, and as many warps as keep the state weight's operands in registers. Loads four steps ahead cover their
    latency, and eight share the sums of y where registers and instructions are few; two steps of states are what the
    backward's registers hold (one where products of float32 take them). A checkpoint every 16 steps costs 4 % of the
    forward's time and a sixteenth of all states. States are rebuilt into shared memory, if that leaves an SM as many
    programs as its registers do: 3 to 5 % of a step.
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
    schedule = Schedule(forward, backward, interval=16, tanh=tanh, layouts=layouts)
    if explicit and schedule.scratch_bytes(variant) * (RESIDENT_WARPS // warps) <= device.shared_bytes:
        schedule = replace(schedule, backward=replace(backward, scratch=Scratch.SHARED))
    return check(variant, schedule, device)
