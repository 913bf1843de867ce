"""The knobs that schedules of every family have, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from operator import attrgetter
from typing import Any, ClassVar, Self

from m2gen.device import Device
from m2gen.spec import TanhMode
from m2gen.variant import Variant


class Family(StrEnum):
    """A family of kernels, with templates, knobs and a check of its own."""

    PORTABLE = "portable"
    """Triton, whose compiler decides which thread holds which element: every target, dtype and the interpreter."""
    MMA = "mma"
    """Gluon, in the layouts of ``mma.sync``: operands are loaded into the layouts of the products, and move through no
    shared memory. 16-bit operands on NVIDIA only. A NaN or an infinity in k or v may reach the y of the same
    iteration's earlier steps, since one product makes every step's k v^T."""
    WGMMA = "wgmma"
    """Gluon, and products by ``wgmma``: a warpgroup has 64 rows, and reads right operands from shared memory, where an
    interval's vectors are loaded together. States of 64 columns on Hopper only. A NaN or an infinity in v may reach the
    y of all steps whose operands are loaded with its own, up to fifteen before it, whatever the interval."""


class Tanh(StrEnum):
    """How tanh is computed."""

    PTX = "ptx"
    """``tanh.approx.f32``: one special-function instruction, relative error 2^-11; NVIDIA only."""
    EXP = "exp"
    """``exp2`` with a series near 0: float32 accuracy everywhere, also in the interpreter."""


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
    """Shared memory; where threads read back what they wrote themselves. It limits programs an SM."""
    SLOTS = "slots"
    """Shared memory, in 16 bits, which has the state, the slope of tanh and H - Z of every step of an interval. tanh is
    evaluated once, and tensor cores make the sums, in which each step has a slot. In ``mma`` for bfloat16 and
    up to 128 columns (``schedule/slots.py``); in ``wgmma`` all that the family serves."""


Value = int | Reduction | Scratch | Tanh
Axes = Mapping[str, tuple[Value, ...]]
"""Knobs by the name of their attribute, and the values of each that are searched."""

USUAL_INTERVAL = 16
"""Steps between the checkpoints of defaults."""
SHORTEST_SEGMENT = 128
"""With fewer steps, a program's prologue takes much of its time. Tuned problems are longer, so kernels that
are timed are those that were verified."""
MOST_SEGMENTS = 64
"""More segments than this save nothing: the last wave is already short."""


class Knobs:
    """One way to run a variant, forward and backward, coupled by the checkpoint interval; families are subclasses."""

    forward: Any
    """Rows of the state that one program holds (rows never mix, so K splits freely), warps, the steps of an iteration,
    and how programs sum y."""
    backward: Any
    """The same, and the steps whose states live in registers between their recomputation and their gradients."""
    interval: int
    """Steps between the states that the forward saves. Above ``backward.chunk``, the backward rebuilds the states of
    one interval into a scratch, ``chunk`` steps apart."""
    tanh: Tanh
    family: Family

    AXES: ClassVar[Axes]
    """Every knob and the values that are searched."""
    PARTS: ClassVar[Mapping[str, type]]
    """Types of ``forward`` and ``backward``."""
    IMPLIED: ClassVar[Mapping[str, Value]] = {}
    """Values that records and recipes leave out, which were written before their knobs."""

    @property
    def segments(self) -> int:
        """Parts of a sequence's scan, each a program that goes on from the state of the one before it.

        Where the GPU does not hold all programs at once, much of it may be idle during the last wave, which is shorter
        if programs are. Bits are those of one part.
        """
        return 1

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the schedule that has these values, one for each axis; others are ignored."""
        found: dict[str, Any] = {name: values[name] for name in cls.AXES if "." not in name}
        for side, part in cls.PARTS.items():
            names = (name.partition(".")[2] for name in cls.AXES if name.startswith(f"{side}."))
            found[side] = part(**{name: value for name in names if (value := values.get(f"{side}.{name}")) is not None})
        return cls(**found)

    @classmethod
    def axes(cls, variant: Variant, device: Device) -> Axes:
        """Return the axes without values that no schedule of the variant can have."""
        rows = ("forward.rows", "backward.rows")
        return {
            name: tuple(
                value
                for value in values
                if not (name in rows and isinstance(value, int) and value > variant.padded_rows)
                and not (name == "tanh" and list(tanh_problems(Tanh(str(value)), variant, device)))
            )
            for name, values in cls.AXES.items()
        }

    @classmethod
    def beside(cls, values: Mapping[str, Value]) -> Mapping[str, Value]:
        """Return the knobs that the other kernel must have where one kernel has these; none where any will do."""
        return {}

    def on(self, device: Device) -> Self:
        """Return the schedule with the knobs that a device decides alone as they are best there."""
        return self

    @property
    def two_level(self) -> bool:
        """Whether the backward rebuilds states into a scratch, rather than loading every chunk's checkpoint."""
        return self.interval > int(self.backward.chunk)

    @property
    def slots(self) -> bool:
        """Whether the backward keeps every step of an interval, each in a slot of the products that make its sums."""
        return bool(self.backward.scratch is Scratch.SLOTS)

    @property
    def warps_have_slots(self) -> bool:
        """Whether each warp of such a backward makes the sums of its own rows, dW among them."""
        return False

    def checkpoint_bytes(self, variant: Variant) -> int:
        """Return the bytes of an element of the states that the forward saves.

        16 bits are enough where slots rebuild from them, since products round them to 8 bits anyway.
        """
        return 2 if self.slots else 4

    def scratch_bytes(self, variant: Variant) -> int:
        """Return what one program's scratch takes, wherever it is."""
        if not self.two_level:
            return 0
        return self.interval // int(self.backward.chunk) * int(self.backward.rows) * variant.padded_cols * 4

    @property
    def shortest_segment(self) -> int:
        """Fewest steps that are a program of their own: whole intervals."""
        return -(-SHORTEST_SEGMENT // self.interval) * self.interval

    @property
    def slug(self) -> str:
        """Name the schedule as an identifier that ``parse`` reads, for tables and logs."""
        segments = f"_s{self.segments}" if self.segments > 1 else ""
        return f"{self.family}_{self.forward.slug}_{self.backward.slug}_i{self.interval}{segments}_{self.tanh}"

    def describe(self, beside: object = None) -> str:
        """Say family, rows of the state a program, warps and segments: ``mma, 64/32 rows, 2/1 warps, 7 segments``.

        Two numbers are of the forward and of the backward. ``beside`` another schedule, the other knobs in which they
        differ follow a semicolon.
        """
        rows, warps = _both(self.forward.rows, self.backward.rows), _both(self.forward.warps, self.backward.warps)
        words = [str(self.family), f"{rows} rows", f"{warps} warp" if warps == "1" else f"{warps} warps"]
        words += [f"{self.segments} segments"] if self.segments > 1 else []
        knobs = self._differing(beside) if isinstance(beside, Knobs) else []
        return "; ".join([", ".join(words), *([", ".join(knobs)] if knobs else [])])

    def _differing(self, other: Knobs) -> list[str]:
        """Return the knobs that ``describe`` does not say, and that ``other`` has not alike."""
        names = [name for name in self.AXES if name.rpartition(".")[2] not in ("rows", "warps", "segments")]
        mine, others = ({name: attrgetter(name)(each) for name in names} for each in (self, other))
        return [name if value is True else f"{name} {value}" for name, value in mine.items() if others[name] != value]


def _both(forward: int, backward: int) -> str:
    return str(forward) if forward == backward else f"{forward}/{backward}"


def best_tanh(variant: Variant, device: Device) -> Tanh:
    """Return the fastest tanh that the spec and the device allow."""
    return Tanh.EXP if list(tanh_problems(Tanh.PTX, variant, device)) else Tanh.PTX


def tanh_problems(tanh: Tanh, variant: Variant, device: Device) -> Iterator[str]:
    """Yield why kernels cannot compute tanh like this."""
    if tanh is Tanh.PTX and not device.is_nvidia:
        yield f"tanh must be exp on {device.arch}, got {tanh}"
    if tanh is Tanh.PTX and variant.tanh is TanhMode.EXACT:
        yield f"tanh must be exp where the spec asks for exact, got {tanh}"
