"""The ``wgmma`` family: Gluon kernels of one warpgroup, for states of 64 columns on Hopper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from m2gen.device import Device
from m2gen.schedule.knobs import Axes, Family, Knobs, Reduction, Scratch, Tanh, best_tanh, tanh_problems
from m2gen.spec import Dtype
from m2gen.variant import Variant

HOPPER = "sm_90"
"""The one architecture that has ``wgmma``."""
ROWS = COLS = 64
"""Rows of a warpgroup's product, and columns of the states that are served."""
SLOTS = 8
"""Most steps of an interval, whose sums one product makes: the columns of a product."""
SLOT_BYTES = ROWS * COLS * 3 * 2
"""A step's state, slope and gap."""
OPERANDS_BYTES = 31_872
"""Shared memory that a backward needs beside these: W, D and an interval's vectors, and df's sums."""
MANY_HEADS = 16
"""With this many heads or more, a batch gives most SMs a warpgroup."""


@dataclass(frozen=True)
class Warpgroup:
    """How either kernel runs: four warps of 16 rows each, step by step."""

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

    slots: ClassVar[bool] = False
    registers: ClassVar[int] = 0


@dataclass(frozen=True)
class WarpgroupBackward(Warpgroup):
    """How the backward runs: a step's state, slope and gap in shared memory, its sums in slots of products."""

    scratch: ClassVar[Scratch] = Scratch.SLOTS
    xorsign: ClassVar[bool] = True


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
        "backward.reduction": tuple(Reduction),
        "interval": (2, 4, SLOTS),
        "tanh": tuple(Tanh),
    }
    PARTS: ClassVar = {"forward": WarpgroupForward, "backward": WarpgroupBackward}

    @classmethod
    def unsupported(cls, variant: Variant, device: Device) -> str:
        """Say why no schedule of the family serves a variant on a device; empty where one does."""
        if device.arch != HOPPER:
            return f"family must be portable or mma on {device.arch}"
        if variant.dtype is Dtype.FP32:
            return f"family must be portable for {variant.dtype} on {device.arch}"
        if variant.dtype is Dtype.FP16 and variant.computes_gate:  # of gates near 1, float16 holds neither slopes nor D
            return f"family must be portable or mma for {variant.dtype} where the kernel computes the gate"
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
        """Return what measurements say (docs/performance.md), with no search: as many steps as a product has slots."""
        forward, backward = WarpgroupForward(Reduction.ATOMIC), WarpgroupBackward(Reduction.ATOMIC)
        return cls(forward, backward, SLOTS, best_tanh(variant, device))

    @property
    def two_level(self) -> bool:
        """No: the backward evaluates a step once."""
        return False

    def checkpoint_bytes(self, variant: Variant) -> int:
        """Return 4 for a gate that is computed: its gradients are sums over all steps, of few elements each."""
        return 4 if variant.computes_gate else super().checkpoint_bytes(variant)

    def scratch_bytes(self, variant: Variant) -> int:
        """Return what one program keeps of steps in shared memory."""
        return self.interval * SLOT_BYTES

    def problems(self, variant: Variant, device: Device) -> Iterator[str]:
        """Yield why the schedule cannot serve a variant on a device."""
        unsupported = self.unsupported(variant, device)
        if unsupported:
            yield f"{unsupported}, got {self.family}"
        most = min(SLOTS, (device.shared_bytes - OPERANDS_BYTES) // SLOT_BYTES)
        if not 2 <= self.interval <= most:
            yield f"interval must be from 2 to {most}, got {self.interval}"
        yield from tanh_problems(self.tanh, variant, device)

    @property
    def slug(self) -> str:
        reductions = f"{self.forward.slug}{self.backward.slug}"
        return f"{self.family}_{reductions}_i{self.interval}_{self.tanh}"
