"""The panel: recipes that are worth timing on every workload of the same columns and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from m2gen.schedule.recipes import Recipe
from m2gen.spec import Dtype
from m2gen.variant import Variant

Tile = tuple[int, int, int]
"""Rows of a program, elements of the state a warp, and steps an iteration or a chunk."""
SLOTS = 8


def _recipe(
    family: str, forward: Tile, backward: Tile, scratch: str, interval: int, segments: int = 1, sums: str = "aa"
) -> dict[str, Any]:
    words = {"a": "atomic", "p": "partial"}
    found: dict[str, Any] = {"family": family, "interval": interval, "segments": segments}
    for side, steps, tile, letter in (
        ("forward", "unroll", forward, sums[0]),
        ("backward", "chunk", backward, sums[1]),
    ):
        found |= {f"{side}.rows": tile[0], f"{side}.tile": tile[1], f"{side}.{steps}": tile[2]}
        found[f"{side}.reduction"] = words[letter]
    return found | ({"backward.scratch": scratch} if family == "mma" else {})


def _pairs(family: str, forwards: list[Tile], backwards: list[tuple[Tile, str]], interval: int) -> Iterator[Any]:
    """Yield each forward and each backward at least once: their times add, so that no product is needed."""
    for i in range(max(len(forwards), len(backwards))):
        yield _recipe(family, forwards[i % len(forwards)], *backwards[i % len(backwards)], interval)


def _narrow(dtype: Dtype) -> Iterator[Any]:
    forwards = [(64, 512, 8), (32, 512, 8), (32, 256, 8), (64, 256, 8), (16, 256, 8), (128, 512, 8), (16, 128, 8)]
    if dtype is Dtype.BF16:
        whole = [((256, 512, 8), "slots"), ((256, 256, 8), "slots")]
        yield from _pairs("mma", forwards, whole, SLOTS)
        for segments, forward in product((3, 7), forwards[:2]):
            yield _recipe("mma", forward, (256, 512, 8), "slots", SLOTS, segments)
        yield _recipe("mma", (32, 256, 4), (256, 512, 8), "slots", SLOTS, sums="ap")
    backwards = [((32, 512, 2), "shared"), ((16, 256, 2), "shared"), ((16, 256, 4), "shared"), ((32, 512, 2), "l2")]
    backwards += [] if dtype is Dtype.BF16 else [((64, 512, 2), "shared"), ((32, 256, 2), "shared")]
    yield from _pairs("mma", forwards if dtype is not Dtype.BF16 else forwards[1:5], backwards, 16)
    yield from _pairs("portable", [(32, 512, 4), (16, 256, 4)], [((32, 512, 2), ""), ((16, 256, 2), "")], 16)


def _wide(dtype: Dtype) -> Iterator[Any]:
    for sums, interval in (("aa", 8), ("ap", 8), ("aa", 4)):
        words = {"a": "atomic", "p": "partial"}
        reductions = {"forward.reduction": words[sums[0]], "backward.reduction": words[sums[1]]}
        yield {"family": "wgmma", "interval": interval, **reductions}
    forwards = [(16, 256, 4), (16, 512, 4), (32, 512, 4), (32, 256, 4), (64, 512, 4), (16, 128, 4), (16, 256, 8)]
    backwards = [(16, 256, 2), (16, 512, 2), (32, 512, 2), (32, 256, 2), (16, 256, 1), (16, 128, 2), (16, 256, 4)]
    yield from _pairs("mma", forwards, [(tile, "shared") for tile in backwards], 16)
    yield _recipe("mma", (16, 256, 4), (16, 256, 2), "shared", 16, sums="ap")
    if dtype is Dtype.BF16:
        yield from _pairs("mma", [(16, 128, 8), (16, 256, 8)], [((16, 256, 8), "slots")], SLOTS)
        yield _recipe("mma", (16, 256, 8), (16, 256, 8), "slots", SLOTS) | {"forward.slots": True}
    yield from _pairs("mma", [(32, 512, 2), (64, 256, 4)], [((16, 256, 2), "l2"), ((32, 512, 1), "l2")], 16)
    yield from _pairs("portable", [(16, 256, 4), (16, 512, 2)], [((16, 256, 2), ""), ((16, 512, 1), "")], 16)


def _widest(dtype: Dtype) -> Iterator[Any]:
    forwards = [(16, 256, 4), (16, 256, 2), (16, 512, 4), (32, 512, 2), (16, 256, 1), (16, 512, 1), (64, 1024, 1)]
    backwards = [(16, 256, 2), (16, 256, 1), (16, 512, 1), (32, 512, 1), (16, 256, 4), (32, 1024, 1), (64, 1024, 1)]
    yield from _pairs("portable", forwards, [(tile, "") for tile in backwards], 16)
    yield from _pairs("mma", forwards, [(tile, "shared") for tile in backwards[:5]], 16)
    yield _recipe("mma", (16, 512, 2), (16, 256, 1), "l2", 16)
    yield _recipe("portable", (16, 256, 4), (16, 256, 1), "", 8)
    if dtype is Dtype.BF16:
        yield _recipe("mma", (16, 256, 4), (16, 256, 8), "slots", SLOTS)
        yield _recipe("mma", (16, 256, 8), (16, 256, 8), "slots", SLOTS) | {"forward.slots": True}


def _single(cols: int) -> Iterator[Any]:
    forwards = [(32, 512, 4), (16, 256, 4), (32, 256, 4), (16, 128, 4), (64, 256, 4), (32, 512, 2), (64, 512, 2)]
    backwards = [(32, 512, 1), (16, 256, 1), (32, 256, 1), (16, 128, 2), (16, 256, 2), (16, 128, 1), (32, 256, 2)]
    if cols > 16:
        forwards = [(16, 256, 2), (16, 128, 2), (32, 256, 2), (16, 256, 4), (16, 256, 1), (16, 128, 4), (32, 512, 1)]
        backwards = [(16, 256, 1), (16, 128, 1), (32, 256, 1), (16, 256, 2), (16, 128, 2), (16, 512, 1), (32, 512, 1)]
    yield from _pairs("portable", forwards, [(tile, "") for tile in backwards], 16)
    yield from _pairs("portable", [(64, 128, 2), (16, 64, 4)], [((64, 128, 1), ""), ((16, 64, 1), "")], 16)
    yield _recipe("portable", forwards[0], backwards[0], "", 8)
    yield _recipe("portable", forwards[1], backwards[1], "", 32)


def panel(variant: Variant) -> Iterator[Recipe]:
    """Yield the recipes that are worth timing for a variant of such columns and dtype."""
    cols = variant.padded_cols
    if variant.dtype is Dtype.FP32:
        found = _single(cols)
    else:
        found = _narrow(variant.dtype) if cols == 16 else _wide(variant.dtype) if cols <= 64 else _widest(variant.dtype)
    yield from map(Recipe.read, found)
