"""The space of a kernel's tiles: its axes, and what is valid and cannot win."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import prod

from m2gen.cache import key_of
from m2gen.schedule.layer import DEFAULTS, AnyTiles, DecodeTiles, FinishBackwardTiles, FinishTiles
from m2gen.schedule.layer_knobs import LayerKernel
from m2gen.tune.subject import Space, Subject

MOST_ELEMENTS = {
    LayerKernel.CONVOLVE: 128,
    LayerKernel.CONVOLVE_BACKWARD: 8,
    LayerKernel.DECAY: 64,
    LayerKernel.FINISH: 64,
    LayerKernel.FINISH_BACKWARD: 32,
    LayerKernel.DECODE: 128,
}
"""Elements of a tile with which a thread's registers are full: kernels keep several numbers of each."""


@dataclass(frozen=True)
class TileConstraint:
    """A class of points that cannot win, which the validity predicate allows."""

    reason: str
    excludes: Callable[[Subject, AnyTiles], bool]


def _idle(subject: Subject, tiles: AnyTiles) -> bool:
    return tiles.elements(subject.variant, subject.device) < 1


def _over_registers(subject: Subject, tiles: AnyTiles) -> bool:
    return tiles.elements(subject.variant, subject.device) > MOST_ELEMENTS[tiles.family]


def _repeated(subject: Subject, tiles: AnyTiles) -> bool:
    """Whether half of a knob has the same text: there are not as many rows, channels or heads."""
    variant = subject.variant
    inner = variant.total_heads * variant.head_dim
    if isinstance(tiles, FinishTiles | FinishBackwardTiles):
        return tiles.block >= 2 * inner
    if isinstance(tiles, DecodeTiles):
        shared = (variant.heads.q + variant.heads.k) * variant.state_expansion
        rows, heads = tiles.rows >= 2 * variant.padded_rows, tiles.heads > variant.total_heads
        return rows or heads or tiles.block >= 2 * max(inner, shared)
    return False


TILE_CONSTRAINTS = (
    TileConstraint("threads without an element of a tile", _idle),
    TileConstraint("tiles that take all registers", _over_registers),
    TileConstraint("knobs beyond the rows, channels or heads that there are", _repeated),
)


def enumerate_tiles(subject: Subject, kernel: LayerKernel) -> Space:
    """Return every point of a kernel's space, and how many each reason excludes."""
    kind, pruned, points = type(DEFAULTS[kernel]), Counter[str](), list[AnyTiles]()
    for values in product(*kind.AXES.values()):
        point = kind.of(dict(zip(kind.AXES, values, strict=True)))
        reason = _reason(subject, point)
        if reason is None:
            points.append(point)
        else:
            pruned[reason] += 1
    return Space({kernel: prod(map(len, kind.AXES.values()))}, tuple(points), dict(pruned))


def _reason(subject: Subject, point: AnyTiles) -> str | None:
    for problem in point.problems(subject.variant, subject.device):
        return problem.split(", got")[0]
    return next((c.reason for c in TILE_CONSTRAINTS if c.excludes(subject, point)), None)


def tile_space_hash(kernel: LayerKernel) -> str:
    """Name the declared space of a kernel: changes with an axis, a value or a constraint."""
    facts = (repr(dict(DEFAULTS[kernel].AXES)), str(MOST_ELEMENTS[kernel]))
    return key_of(kernel, *facts, *(constraint.reason for constraint in TILE_CONSTRAINTS))[:12]
