"""The kernels around a layer's recurrence, and what the tiles of each have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, ClassVar, Self

from m2gen.device import Device
from m2gen.schedule.knobs import Axes
from m2gen.variant import Variant

MOST_THREADS = 1024
"""Threads that a program may have on every GPU."""
MOST_ELEMENTS = 2**16
"""Elements of the largest tile."""


class LayerKernel(StrEnum):
    """The kernels around a layer's recurrence, by their names in ``m2rnn_<name>_kernel``; each has tiles of its own."""

    CONVOLVE = "convolve"
    CONVOLVE_BACKWARD = "convolve_backward"
    DECAY = "decay"
    """The gate, and its backward, which has the same tiles."""
    FINISH = "finish"
    FINISH_BACKWARD = "finish_backward"
    DECODE = "decode"


class Tiles(ABC):
    """How one kernel runs; each subclass has the knobs of one."""

    family: LayerKernel
    AXES: ClassVar[Axes]
    """Every knob and the values that are searched."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the tiles that have these values, one for each axis; others are ignored."""
        return cls(**{name: values[name] for name in cls.AXES})

    def on(self, device: Device) -> Self:
        """Return the tiles: a device decides none of them alone."""
        return self

    @property
    def slug(self) -> str:
        """Name the tiles as an identifier that ``parse_tiles`` reads: ``convolve_r32_c128_w4``."""
        return "_".join((self.family, *(f"{name[0]}{getattr(self, name)}" for name in self.AXES)))

    def describe(self, beside: object = None) -> str:
        """Say every knob: ``1 row, block 1024, 4 warps``."""
        return ", ".join(
            f"{name} {value}" if name[-1] != "s" else f"{value} {name[:-1] if value == 1 else name}"
            for name in self.AXES
            for value in [getattr(self, name)]
        )

    def problems(self, variant: Variant, device: Device) -> Iterator[str]:
        """Yield why a layer of ``variant`` cannot run the kernel like this on ``device``."""
        heads = variant.heads
        if heads.v != heads.total:
            yield f"family must serve a v of all {heads.total} heads, got {self.family} for {heads.v}"
        for name in self.AXES:
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1, got {getattr(self, name)}"
                return
        yield from not_powers(self, {"warps": 1} if "warps" in self.AXES else {})
        warps = getattr(self, "warps", 1)
        if warps * device.warp_size > MOST_THREADS:
            yield f"warps must be at most {MOST_THREADS // device.warp_size} on {device.arch}, got {warps}"
        yield from self._problems()

    @abstractmethod
    def _problems(self) -> Iterator[str]:
        """Yield what is wrong with the knobs of this kernel."""

    @abstractmethod
    def elements(self, variant: Variant, device: Device) -> float:
        """Return how many elements of its largest tile a thread has."""


def not_powers(tiles: Tiles, least: Mapping[str, int]) -> Iterator[str]:
    """Yield the knobs that are no power of two from a least one on."""
    for name, low in least.items():
        value = getattr(tiles, name)
        if value < low or value & (value - 1):
            yield f"{name} must be a power of two, at least {low}, got {value}"


def too_large(what: str, size: int) -> Iterator[str]:
    """Yield that a tile, or a side of it, has too many elements."""
    if size > MOST_ELEMENTS:
        yield f"{what} must be at most {MOST_ELEMENTS}, got {size}"
