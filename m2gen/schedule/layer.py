"""Tiles of the kernels around a layer's recurrence: the knobs of each kernel, its axes, default and check.

These kernels move memory, so that their defaults, found by one sweep on an H200, come near its speed; ``m2gen tune
--kernels layer`` searches them. One kernel's time depends on its own tiles alone, so each is searched by itself.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from m2gen.device import Device
from m2gen.errors import ScheduleError
from m2gen.schedule.knobs import Axes
from m2gen.variant import MIN_TILE, Variant

MOST_THREADS = 1024
"""Threads that a program may have on every GPU."""
MOST_ELEMENTS = 2**16
"""Elements of the largest tile."""
SMALLEST_BLOCK = 128
"""Fewest channels of a piece: a token's pieces stand one by one in the kernel's text."""
MOST_UNROLLED = 16
MOST_HEADS = 64


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
        yield from _not_powers(self, {"warps": 1} if "warps" in self.AXES else {})
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


def _not_powers(tiles: Tiles, least: Mapping[str, int]) -> Iterator[str]:
    """Yield the knobs that are no power of two from a least one on."""
    for name, low in least.items():
        value = getattr(tiles, name)
        if value < low or value & (value - 1):
            yield f"{name} must be a power of two, at least {low}, got {value}"


def _too_large(what: str, size: int) -> Iterator[str]:
    if size > MOST_ELEMENTS:
        yield f"{what} must be at most {MOST_ELEMENTS}, got {size}"


@dataclass(frozen=True)
class ConvolveTiles(Tiles):
    """Tokens and channels of a program of the convolution."""

    rows: int = 32
    cols: int = 128
    warps: int = 4
    family: Literal[LayerKernel.CONVOLVE] = field(default=LayerKernel.CONVOLVE, kw_only=True)
    AXES: ClassVar[Axes] = {"rows": (4, 8, 16, 32, 64, 128), "cols": (64, 128, 256, 512), "warps": (1, 2, 4, 8)}

    def _problems(self) -> Iterator[str]:
        yield from _not_powers(self, {"rows": 1, "cols": 1})
        yield from _too_large("rows x cols", self.rows * self.cols)

    def elements(self, variant: Variant, device: Device) -> float:
        return self.rows * self.cols / (self.warps * device.warp_size)


@dataclass(frozen=True)
class ConvolveBackwardTiles(Tiles):
    """Steps, taken one after the other, and channels of a program of the convolution's backward.

    The more steps there are, the fewer are computed twice, and the fewer partial sums there are to add.
    """

    steps: int = 64
    cols: int = 128
    warps: int = 1
    unroll: int = 4
    """Steps of an iteration, whose operands are loaded together."""
    family: Literal[LayerKernel.CONVOLVE_BACKWARD] = field(default=LayerKernel.CONVOLVE_BACKWARD, kw_only=True)
    AXES: ClassVar[Axes] = {
        "steps": (16, 32, 64, 128, 256),
        "cols": (32, 64, 128, 256, 512),
        "warps": (1, 2, 4, 8),
        "unroll": (1, 2, 4, 8),
    }

    def _problems(self) -> Iterator[str]:
        yield from _not_powers(self, {"cols": 1})
        yield from _too_large("cols", self.cols)
        if self.unroll > MOST_UNROLLED or self.steps % self.unroll:
            yield f"unroll must be at most {MOST_UNROLLED} and divide steps = {self.steps}, got {self.unroll}"

    def elements(self, variant: Variant, device: Device) -> float:
        return self.cols / (self.warps * device.warp_size)


@dataclass(frozen=True)
class DecayTiles(Tiles):
    """Tokens of a program of the gate's kernels."""

    rows: int = 32
    warps: int = 4
    family: Literal[LayerKernel.DECAY] = field(default=LayerKernel.DECAY, kw_only=True)
    AXES: ClassVar[Axes] = {"rows": (4, 8, 16, 32, 64, 128), "warps": (1, 2, 4, 8)}

    def _problems(self) -> Iterator[str]:
        yield from _not_powers(self, {"rows": 1})
        yield from _too_large("rows", self.rows)

    def elements(self, variant: Variant, device: Device) -> float:
        return self.rows * variant.heads.f / (self.warps * device.warp_size)


class _Epilogue(Tiles):
    """Tokens of a program of the epilogue, taken one after the other, and how it holds their channels."""

    rows: int
    block: int
    warps: int

    def _problems(self) -> Iterator[str]:
        yield from _not_powers(self, {"block": SMALLEST_BLOCK})
        yield from _too_large("block", self.block)

    def elements(self, variant: Variant, device: Device) -> float:
        return variant.total_heads * variant.head_dim / (self.warps * device.warp_size)


@dataclass(frozen=True)
class FinishTiles(_Epilogue):
    """How the epilogue runs."""

    rows: int = 1
    block: int = 1024
    """Most channels that a program holds in one piece."""
    warps: int = 4
    family: Literal[LayerKernel.FINISH] = field(default=LayerKernel.FINISH, kw_only=True)
    AXES: ClassVar[Axes] = {
        "rows": (1, 2, 4, 8, 16),
        "block": (256, 512, 1024, 2048, 4096),
        "warps": (1, 2, 4, 8, 16),
    }


@dataclass(frozen=True)
class FinishBackwardTiles(_Epilogue):
    """How the epilogue's backward runs: the more tokens, the fewer partial sums there are to add."""

    rows: int = 64
    block: int = 2048
    warps: int = 8
    family: Literal[LayerKernel.FINISH_BACKWARD] = field(default=LayerKernel.FINISH_BACKWARD, kw_only=True)
    AXES: ClassVar[Axes] = {
        "rows": (8, 16, 32, 64, 128),
        "block": (256, 512, 1024, 2048, 4096),
        "warps": (2, 4, 8, 16),
    }


@dataclass(frozen=True)
class DecodeTiles(Tiles):
    """Heads of a program of the decode kernel, which it advances one after the other; its warps follow from the state.

    A program needs a place of its own for what heads share, so that more heads are fewer bytes and fewer programs.
    """

    heads: int = 4
    rows: int = 64
    """Most rows of a state that a program holds at once."""
    block: int = 1024
    """Most channels that a program holds in one piece."""
    family: Literal[LayerKernel.DECODE] = field(default=LayerKernel.DECODE, kw_only=True)
    AXES: ClassVar[Axes] = {
        "heads": (1, 2, 3, 4, 6, 8, 12, 16),
        "rows": (16, 32, 64, 128, 256),
        "block": (256, 512, 1024, 2048),
    }

    def _problems(self) -> Iterator[str]:
        yield from _not_powers(self, {"rows": MIN_TILE, "block": SMALLEST_BLOCK})
        yield from _too_large("block", max(self.block, self.rows))
        if self.heads > MOST_HEADS:
            yield f"heads must be at most {MOST_HEADS}, got {self.heads}"

    def elements(self, variant: Variant, device: Device) -> float:
        return 1.0  # it has as many warps as its tile asks for


AnyTiles = Annotated[
    ConvolveTiles | ConvolveBackwardTiles | DecayTiles | FinishTiles | FinishBackwardTiles | DecodeTiles,
    Field(discriminator="family"),
]


@dataclass(frozen=True)
class LayerTiles:
    """The tiles of all kernels of a layer."""

    convolve: ConvolveTiles = ConvolveTiles()
    convolve_backward: ConvolveBackwardTiles = ConvolveBackwardTiles()
    decay: DecayTiles = DecayTiles()
    finish: FinishTiles = FinishTiles()
    finish_backward: FinishBackwardTiles = FinishBackwardTiles()
    decode: DecodeTiles = DecodeTiles()

    def __iter__(self) -> Iterator[AnyTiles]:
        return (getattr(self, each.name) for each in fields(self))

    @classmethod
    def of(cls, tiles: Iterable[AnyTiles]) -> LayerTiles:
        """Return tiles that are these where they are given, else the defaults."""
        given: dict[str, Any] = {each.family: each for each in tiles}
        return cls(**given)

    @property
    def slug(self) -> str:
        """Name every kernel's tiles."""
        return " ".join(each.slug for each in self)


USUAL = LayerTiles()
"""What serves where no record of the tuning database does."""
DEFAULTS: Mapping[LayerKernel, AnyTiles] = {tiles.family: tiles for tiles in USUAL}
_SLUG = re.compile(rf"({'|'.join(LayerKernel)})((?:_[a-z][0-9]{{1,9}})+)", re.ASCII)


def parse_tiles(slug: str) -> AnyTiles:
    """Return the tiles that a slug names; raises ``ScheduleError`` for any other text."""
    found = _SLUG.fullmatch(slug)
    if found is not None:
        kind, knobs = type(DEFAULTS[LayerKernel(found[1])]), found[2].split("_")[1:]
        if [knob[0] for knob in knobs] == [name[0] for name in kind.AXES]:
            return kind.of(dict(zip(kind.AXES, (int(knob[1:]) for knob in knobs), strict=True)))
    raise ScheduleError(f"tiles must begin with their kernel, as convolve_r32_c128_w4, got {slug!r}")
