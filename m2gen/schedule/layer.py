"""Tiles of the kernels around a layer's recurrence: the knobs of each kernel, its axes, default and check.

These kernels move memory, so that their defaults, found by one sweep on an H200, come near its speed; ``m2gen tune
--kernels layer`` searches them. One kernel's time depends on its own tiles alone, so each is searched by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from m2gen.device import Device
from m2gen.schedule.knobs import Axes
from m2gen.schedule.layer_knobs import LayerKernel, Tiles, not_powers, too_large
from m2gen.variant import MIN_TILE, Variant

SMALLEST_BLOCK = 128
"""Fewest channels of a piece: a token's pieces stand one by one in the kernel's text."""
MOST_UNROLLED = 16
MOST_HEADS = 64


@dataclass(frozen=True)
class ConvolveTiles(Tiles):
    """Tokens and channels of a program of the convolution."""

    rows: int = 32
    cols: int = 128
    warps: int = 4
    family: Literal[LayerKernel.CONVOLVE] = field(default=LayerKernel.CONVOLVE, kw_only=True)
    AXES: ClassVar[Axes] = {"rows": (4, 8, 16, 32, 64, 128), "cols": (64, 128, 256, 512), "warps": (1, 2, 4, 8)}

    def _problems(self) -> Iterator[str]:
        yield from not_powers(self, {"rows": 1, "cols": 1})
        yield from too_large("rows x cols", self.rows * self.cols)

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
        yield from not_powers(self, {"cols": 1})
        yield from too_large("cols", self.cols)
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
        yield from not_powers(self, {"rows": 1})
        yield from too_large("rows", self.rows)

    def elements(self, variant: Variant, device: Device) -> float:
        return self.rows * variant.heads.f / (self.warps * device.warp_size)


class _Epilogue(Tiles):
    """Tokens of a program of the epilogue, taken one after the other, and how it holds their channels."""

    rows: int
    block: int
    warps: int

    def _problems(self) -> Iterator[str]:
        yield from not_powers(self, {"block": SMALLEST_BLOCK})
        yield from too_large("block", self.block)

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
        yield from not_powers(self, {"rows": MIN_TILE, "block": SMALLEST_BLOCK})
        yield from too_large("block", max(self.block, self.rows))
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
