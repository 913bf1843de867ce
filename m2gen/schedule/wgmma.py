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
OPERANDS_BYTES = 44_160
"""Shared memory that a backward needs beside its states: three operands of products, an interval's vectors, and sums of
warps."""
STATE_BYTES = ROWS * COLS * 4
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
    scratch: ClassVar[Scratch] = Scratch.SHARED
    slots: ClassVar[bool] = False

    def parts(self, variant: Variant) -> int:
        """Return how many programs share one head's state."""
        return variant.padded_rows // self.rows

    @property
    def slug(self) -> str:
        return f"{self.reduction[0]}"


@dataclass(frozen=True)
class Wgmma(Knobs):
    """A schedule of one tile of 64 rows a program."""

    forward: Warpgroup
    backward: Warpgroup
    interval: int
    tanh: Tanh
    family: Literal[Family.WGMMA] = field(default=Family.WGMMA, kw_only=True)

    AXES: ClassVar[Axes] = {
        "forward.reduction": tuple(Reduction),
        "backward.reduction": tuple(Reduction),
        "interval": (2, 4, 8, LONGEST_INTERVAL),
        "tanh": tuple(Tanh),
    }
    PARTS: ClassVar = {"forward": Warpgroup, "backward": Warpgroup}

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
        part = Warpgroup(Reduction.ATOMIC)
        return cls(part, part, LONGEST_INTERVAL, best_tanh(variant, device))

    def scratch_bytes(self, variant: Variant) -> int:
        """Return what one program's states take in shared memory; the last of an interval is in registers."""
        return (self.interval - 1) * STATE_BYTES

    def problems(self, variant: Variant, device: Device) -> Iterator[str]:
        """Yield why the schedule cannot serve a variant on a device."""
        unsupported = self.unsupported(variant, device)
        if unsupported:
            yield f"{unsupported}, got {self.family}"
        most = (device.shared_bytes - OPERANDS_BYTES) // STATE_BYTES + 1
        if not 2 <= self.interval <= most:
            yield f"interval must be from 2 to {most}, got {self.interval}"
        yield from tanh_problems(self.tanh, variant, device)

    @property
    def slug(self) -> str:
        reductions = f"{self.forward.slug}{self.backward.slug}"
        return f"{self.family}_{reductions}_i{self.interval}_{self.tanh}"
