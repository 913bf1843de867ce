"""The ``wgmma`` family: Gluon kernels of one warpgroup, for states of 64 columns on Hopper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from m2gen.device import Device
from m2gen.schedule.knobs import Axes, Family, Knobs, Reduction, Scratch, Tanh, best_tanh, tanh_problems
from m2gen.spec import Dtype
from m2gen.variant import Variant

HOPPER = "sm_90"
"""The one architecture that has ``wgmma``."""
ROWS = COLS = 64
"""Rows of a warpgroup's product, and columns of the states that are served."""
OPERANDS_BYTES = 44_160
"""Shared memory that a backward needs beside its states: three operands of products, an interval's vectors, and sums of
warps."""
STATE_BYTES = ROWS * COLS * 4
SLOTS = 8
"""Most steps of an interval whose sums one product makes: the columns of a product."""
SLOT_BYTES = ROWS * COLS * 3 * 2
"""A step's state, slope and gap."""
SLOTS_OPERANDS_BYTES = 31_872
"""Shared memory that a backward with slots needs beside these: W, D and an interval's vectors, and df's sums."""
LONGEST_INTERVAL = 12
"""Steps of an interval: as many states as fit in shared memory beside the operands."""
MANY_HEADS = 16
"""With this many heads or more, a batch gives most SMs a warpgroup."""


@dataclass(frozen=True)
class Warpgroup:
    """How either kernel runs: four warps of 16 rows each, step by step, states in shared memory."""

    reduction: Reduction

    rows: ClassVar[int] = ROWS
    warps: ClassVar[int] = 4
    unroll: ClassVar[int] = 1
    chunk: ClassVar[int] = 1

    def parts(self, variant: Variant) -> int:
        """Return how many programs share one head's state."""
        return variant.padded_rows // self.rows

    @property
    def slug(self) -> str:
        return f"{self.reduction[0]}"


@dataclass(frozen=True)
class WarpgroupForward(Warpgroup):
    """How the forward runs."""

    slots: bool = False
    """Whether each step whose operands are loaded together has a slot of the products that make k v^T and y."""

    @property
    def slug(self) -> str:
        return super().slug + ("t" if self.slots else "")


@dataclass(frozen=True)
class WarpgroupBackward(Warpgroup):
    """How the backward runs."""

    scratch: Scratch = Scratch.SHARED

    @property
    def slug(self) -> str:
        return super().slug + ("t" if self.scratch is Scratch.SLOTS else "")


@dataclass(frozen=True)
class Wgmma(Knobs):
    """A schedule of one tile of 64 rows a program."""

    forward: WarpgroupForward
    backward: WarpgroupBackward
    interval: int
    tanh: Tanh
    family: Literal[Family.WGMMA] = field(default=Family.WGMMA, kw_only=True)

    AXES: ClassVar[Axes] = {
        "forward.reduction": tuple(Reduction),
        "forward.slots": (False, True),
        "backward.reduction": tuple(Reduction),
        "backward.scratch": (Scratch.SHARED, Scratch.SLOTS),
        "interval": (2, 4, 8, LONGEST_INTERVAL),
        "tanh": tuple(Tanh),
    }
    PARTS: ClassVar = {"forward": WarpgroupForward, "backward": WarpgroupBackward}
    IMPLIED: ClassVar = {"forward.slots": False, "backward.scratch": Scratch.SHARED}

    @classmethod
    def unsupported(cls, variant: Variant, device: Device) -> str:
        """Say why no schedule of the family serves a variant on a device; empty where one does."""
        if device.arch != HOPPER:
            return f"family must be portable or mma on {device.arch}"
        if variant.dtype is Dtype.FP32:
            return f"family must be portable for {variant.dtype} on {device.arch}"
        if variant.padded_cols != COLS or variant.padded_rows < ROWS:
            return "family must be portable or mma unless V is from 33 to 64 and K above 32"
        return ""

    @classmethod
    def preferred(cls, variant: Variant, device: Device) -> bool:
        """Whether the family's default serves until a search finds better: where there are many heads.

        It takes half the time if a batch gives every SM a warpgroup, 1.4 times as long if it gives one to a quarter.
        """
        tiles = variant.total_heads * (variant.padded_rows // ROWS)
        return not cls.unsupported(variant, device) and tiles >= MANY_HEADS

    @classmethod
    def default(cls, variant: Variant, device: Device) -> Self:
        """Return what measurements say (docs/performance.md), with no search: as many states as fit."""
        forward, backward = WarpgroupForward(Reduction.ATOMIC), WarpgroupBackward(Reduction.ATOMIC)
        return cls(forward, backward, LONGEST_INTERVAL, best_tanh(variant, device))

    @property
    def with_slots(self) -> tuple[Self, Self]:
        """The schedules whose steps have slots, as many as a product has: in both kernels, and in the backward."""
        backward = replace(self.backward, scratch=Scratch.SLOTS)
        forwards = (replace(self.forward, slots=slots) for slots in (True, False))
        both, one = (replace(self, forward=forward, backward=backward, interval=SLOTS) for forward in forwards)
        return both, one

    @property
    def two_level(self) -> bool:
        """Whether the backward evaluates a step twice: where states alone are kept of it."""
        return not self.slots

    def scratch_bytes(self, variant: Variant) -> int:
        """Return what one program keeps of steps in shared memory; without slots an interval's last is in registers."""
        return self.interval * SLOT_BYTES if self.slots else (self.interval - 1) * STATE_BYTES

    def problems(self, variant: Variant, device: Device) -> Iterator[str]:
        """Yield why the schedule cannot serve a variant on a device."""
        unsupported = self.unsupported(variant, device)
        if unsupported:
            yield f"{unsupported}, got {self.family}"
        most = (device.shared_bytes - OPERANDS_BYTES) // STATE_BYTES + 1
        if self.slots:
            most = min(SLOTS, (device.shared_bytes - SLOTS_OPERANDS_BYTES) // SLOT_BYTES)
        if not 2 <= self.interval <= most:
            beside = " where backward.scratch is slots" if self.slots else ""
            yield f"interval must be from 2 to {most}{beside}, got {self.interval}"
        if self.backward.scratch is Scratch.L2:
            yield f"backward.scratch must be shared or slots, got {self.backward.scratch}"
        yield from tanh_problems(self.tanh, variant, device)

    @property
    def slug(self) -> str:
        reductions = f"{self.forward.slug}{self.backward.slug}"
        return f"{self.family}_{reductions}_i{self.interval}_{self.tanh}"
