"""The ``portable`` family: Triton's compiler lays kernels out, for every target and dtype, and for the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from m2gen.device import Device
from m2gen.schedule.knobs import USUAL_INTERVAL, Axes, Family, Knobs, Reduction, Scratch, Tanh, best_tanh
from m2gen.schedule.tiles import (
    BACKWARD_AXES,
    FORWARD_AXES,
    SHARED_AXES,
    BackwardTile,
    ForwardTile,
    tile_problems,
    usual_tile,
)
from m2gen.spec import Dtype
from m2gen.variant import Variant


@dataclass(frozen=True)
class PortableForward(ForwardTile):
    """How a portable forward runs: the compiler makes its sums, in which steps have no slots."""

    slots: ClassVar[bool] = False
    registers: ClassVar[int] = 0


@dataclass(frozen=True)
class PortableBackward(BackwardTile):
    """How a portable backward runs: other threads may read from its scratch what one wrote, so the L2 has it."""

    scratch: ClassVar[Scratch] = Scratch.L2
    xorsign: ClassVar[bool] = False


@dataclass(frozen=True)
class Portable(Knobs):
    """A schedule whose layouts are the compiler's."""

    forward: PortableForward
    backward: PortableBackward
    interval: int
    tanh: Tanh
    segments: int = 1
    family: Literal[Family.PORTABLE] = field(default=Family.PORTABLE, kw_only=True)

    AXES: ClassVar[Axes] = {**FORWARD_AXES, **BACKWARD_AXES, **SHARED_AXES}
    PARTS: ClassVar = {"forward": PortableForward, "backward": PortableBackward}

    @classmethod
    def unsupported(cls, variant: Variant, device: Device) -> str:
        """Say why no schedule of the family serves a variant on a device: there is always one."""
        return ""

    @classmethod
    def preferred(cls, variant: Variant, device: Device) -> bool:
        """Whether the family's default serves until a search finds better: it is the last one to be asked."""
        return True

    @classmethod
    def default(cls, variant: Variant, device: Device) -> Self:
        """Return what measurements say of shapes (docs/performance.md), with no search.

        States of up to 16 columns: one warp and 32 rows, as rows are independent and a barrier between warps costs more
        than the arithmetic. Wider states: 16 rows, and as many warps as keep the state weight's operands in registers.
        Loads four steps ahead cover their latency; two steps of states are what the backward's registers hold, one
        where products of float32 take them. A checkpoint every 16 steps costs 4 % of the forward's time and a sixteenth
        of all states.
        """
        rows, warps = usual_tile(variant, device)
        single = variant.dtype is Dtype.FP32
        forward = PortableForward(rows, warps, 2 if single and warps > 1 else 4, Reduction.ATOMIC)
        backward = PortableBackward(rows, warps, 1 if single else 2, Reduction.ATOMIC)
        return cls(forward, backward, USUAL_INTERVAL, best_tanh(variant, device))

    def problems(self, variant: Variant, device: Device) -> Iterator[str]:
        """Yield why the schedule cannot serve a variant on a device."""
        yield from tile_problems(self, variant, device)
