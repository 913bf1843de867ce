"""The ``mma`` family: Gluon kernels in the layouts of ``mma.sync``, for 16-bit operands on NVIDIA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import ClassVar, Literal, Self

from m2gen.device import Device
from m2gen.schedule.knobs import USUAL_INTERVAL, Axes, Family, Knobs, Reduction, Scratch, Tanh, Value, best_tanh
from m2gen.schedule.mma_tiles import FORWARD_REGISTERS, MmaBackward, MmaForward, sums_bytes
from m2gen.schedule.slots import SLOT_ROWS, SLOTS, checkpoint_bytes, slot_problems
from m2gen.schedule.tiles import BACKWARD_AXES, FORWARD_AXES, SHARED_AXES, most_warps, tile_problems, usual_tile
from m2gen.spec import Dtype
from m2gen.variant import MIN_TILE, Variant

MOST_COLS = 64
"""Columns up to which threads have registers for the state weight; a compiler that chooses layouts keeps it in shared
memory, where these kernels spill 350 bytes a thread at 128."""
RESIDENT_WARPS = 8
"""Warps that an SM of NVIDIA has registers for, with the 255 a thread that a backward takes."""


@dataclass(frozen=True)
class Mma(Knobs):
    """A schedule of 16 x 8 tiles; every warp has one or more of them."""

    forward: MmaForward
    backward: MmaBackward
    interval: int
    tanh: Tanh
    segments: int = 1
    family: Literal[Family.MMA] = field(default=Family.MMA, kw_only=True)

    AXES: ClassVar[Axes] = {
        **FORWARD_AXES,
        "forward.slots": (False, True),
        "forward.registers": FORWARD_REGISTERS,
        **BACKWARD_AXES,
        "backward.scratch": tuple(Scratch),
        "backward.xorsign": (False, True),
        **SHARED_AXES,
    }
    PARTS: ClassVar = {"forward": MmaForward, "backward": MmaBackward}
    IMPLIED: ClassVar = {"forward.slots": False, "forward.registers": 0, "backward.xorsign": False}

    @classmethod
    def unsupported(cls, variant: Variant, device: Device) -> str:
        """Say why no schedule of the family serves a variant on a device; empty where one does."""
        if device.is_nvidia and variant.dtype is not Dtype.FP32:
            return ""
        return f"family must be portable for {variant.dtype} on {device.arch}"

    @classmethod
    def preferred(cls, variant: Variant, device: Device) -> bool:
        """Whether the family's default serves until a search finds better.

        A step of the published layers takes 0.8 to 0.9 of the time that portable kernels take.
        """
        return not cls.unsupported(variant, device) and variant.padded_cols <= MOST_COLS

    @classmethod
    def default(cls, variant: Variant, device: Device) -> Self:
        """Return what measurements say of shapes (docs/performance.md), with no search.

        Rows and warps are those of portable kernels. Eight steps share the sums of y where registers and instructions
        are few. States are rebuilt into shared memory, if that leaves an SM as many programs as its registers do: 3 to
        5 % of a step.
        """
        rows, warps = usual_tile(variant, device)
        tanh = best_tanh(variant, device)
        unroll = 8 if tanh is Tanh.PTX and (rows, warps) == (32, 1) else 4
        forward = MmaForward(rows, warps, unroll, Reduction.ATOMIC)
        if cls.has_slots(variant, device):
            return cls._default_of_slots(variant, device)
        scratch = USUAL_INTERVAL // 2 * rows * variant.padded_cols * 4
        fits = scratch * (RESIDENT_WARPS // warps) <= device.shared_bytes
        where = Scratch.SHARED if fits else Scratch.L2
        backward = MmaBackward(rows, warps, 2, Reduction.ATOMIC, where, device.has_xorsign)
        return cls(forward, backward, USUAL_INTERVAL, tanh)

    @classmethod
    def has_slots(cls, variant: Variant, device: Device) -> bool:
        """Whether the backward's steps can have slots, and have them until a search finds better."""
        return not list(cls._default_of_slots(variant, device).problems(variant, device))

    @classmethod
    def _can_have_slots(cls, variant: Variant, device: Device) -> bool:
        """Whether some schedule has slots: the default, or one whose warps have columns of the same rows."""
        warps, usual = variant.padded_cols // MIN_TILE, cls._default_of_slots(variant, device)
        forward = replace(usual.forward, rows=MIN_TILE, warps=warps)
        across = replace(usual, forward=forward, backward=replace(usual.backward, rows=MIN_TILE, warps=warps))
        return any(not list(each.problems(variant, device)) for each in (usual, across))

    @classmethod
    def _default_of_slots(cls, variant: Variant, device: Device) -> Self:
        """Return the schedule whose tanh is evaluated once in the backward: two thirds of the time of a step."""
        tanh = best_tanh(variant, device)
        most, rows = SLOT_ROWS[0], min(variant.padded_rows, 2 * SLOT_ROWS[0])
        forward = MmaForward(rows, max(1, rows // most), 8 if tanh is Tanh.PTX else 4, Reduction.ATOMIC)
        warps = max(1, variant.padded_rows // most)
        backward = MmaBackward(variant.padded_rows, warps, SLOTS, Reduction.ATOMIC, Scratch.SLOTS, device.has_xorsign)
        return cls(forward, backward, SLOTS, tanh)

    @classmethod
    def axes(cls, variant: Variant, device: Device) -> Axes:
        """Return the axes without values that no schedule of the variant can have, or that only cost time."""
        found = {**super().axes(variant, device), "backward.xorsign": (device.has_xorsign,)}
        if not cls._can_have_slots(variant, device):
            found |= {"forward.slots": (False,), "forward.registers": (0,)}
        return found

    @classmethod
    def beside(cls, values: Mapping[str, Value]) -> Mapping[str, Value]:
        """Return what a backward must have beside a forward with slots: both kernels have one layout."""
        if not values.get("forward.slots"):
            return {}
        shared = {f"backward.{name}": values[f"forward.{name}"] for name in ("rows", "warps")}
        return {**shared, "backward.scratch": Scratch.SLOTS, "backward.chunk": SLOTS}

    def _differing(self, other: Knobs) -> list[str]:
        """Leave out that the forward has slots where its registers are said, which no other has."""
        found = super()._differing(other)
        return [knob for knob in found if not (self.forward.registers and knob.startswith("forward.slots"))]

    def on(self, device: Device) -> Self:
        """Return the schedule with the clamp that a device has."""
        return replace(self, backward=replace(self.backward, xorsign=device.has_xorsign))

    @property
    def warps_have_slots(self) -> bool:
        return self.slots

    def checkpoint_bytes(self, variant: Variant) -> int:
        return checkpoint_bytes(variant) if self.slots else super().checkpoint_bytes(variant)

    def problems(self, variant: Variant, device: Device) -> Iterator[str]:
        """Yield why the schedule cannot serve a variant on a device."""
        unsupported = self.unsupported(variant, device)
        if unsupported:
            yield f"{unsupported}, got {self.family}"
        yield from tile_problems(self, variant, device)
        for direction, part in (("forward", self.forward), ("backward", self.backward)):
            most = most_warps(variant, part.rows)
            if part.warps > most:
                yield f"{direction}.warps must be at most {most}, each with a 16 x 8 tile, got {part.warps}"
        taken = sums_bytes(variant, self.forward)
        if taken > device.shared_bytes:
            yield f"forward.unroll must take at most {device.shared_bytes} bytes of shared memory for y, got {taken}"
        if self.backward.xorsign and not device.has_xorsign:
            yield f"backward.xorsign must be false on {device.arch}, got true"
        if self.backward.scratch is Scratch.SHARED and self.backward.chunk > 0:
            yield from self._shared_problems(variant, device)
        if self.slots:
            yield from slot_problems(variant, self.backward, self.interval, device)
        if self.forward.slots:
            yield from self._forward_slot_problems()
        if self.forward.registers not in (FORWARD_REGISTERS if self.forward.slots else (0,)):
            valid = " or ".join(map(str, FORWARD_REGISTERS)) if self.forward.slots else "0 unless the forward has slots"
            yield f"forward.registers must be {valid}, got {self.forward.registers}"

    def _forward_slot_problems(self) -> Iterator[str]:
        values = {name: attrgetter(name)(self) for name in self.AXES}
        for name, valid in {"forward.unroll": SLOTS, **self.beside(values)}.items():
            if values[name] != valid:
                yield f"{name} must be {valid} where the forward has slots, got {values[name]}"

    def _shared_problems(self, variant: Variant, device: Device) -> Iterator[str]:
        if not self.two_level:
            limit = f"unless interval is above backward.chunk = {self.backward.chunk}"
            yield f"backward.scratch must be l2 {limit}, got {self.backward.scratch}"
        taken = self.scratch_bytes(variant)
        if taken > device.shared_bytes:
            yield f"backward.scratch must take at most {device.shared_bytes} bytes of shared memory, got {taken}"
