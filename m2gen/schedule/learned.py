"""The learned rule: a tree over problems whose leaves name recipes, from ``learned.json``, which is generated.

``m2gen db learn`` writes the file from trials of searches (docs/tuning.md). An arch without trials has no rule.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

from m2gen.bucket import BUCKETS, HALVES, Bucket
from m2gen.device import Device
from m2gen.schedule.mma import Mma
from m2gen.schedule.portable import Portable
from m2gen.schedule.recipes import Recipe
from m2gen.schedule.wgmma import Wgmma
from m2gen.spec import Dtype, Fp32Products
from m2gen.variant import Variant

FILE = Path(__file__).parent / "learned.json"
PER_SM = dict(zip(BUCKETS, (halves / 2 for halves in (*HALVES, 2 * HALVES[-1])), strict=True))
"""Programs for each SM: the upper bound of each bucket, and of the last, which has none, twice the one before."""


class Kernels(StrEnum):
    """The fastest kernels that can serve a problem, each with a tree of its own."""

    SLOTS = "slots"
    WGMMA = "wgmma"
    MMA = "mma"
    PORTABLE = "portable"


def kernels_of(variant: Variant, device: Device) -> Kernels:
    """Return which kernels can serve a variant on a device."""
    if Mma.has_slots(variant, device):
        return Kernels.SLOTS
    if not Wgmma.unsupported(variant, device):
        return Kernels.WGMMA
    return Kernels.PORTABLE if Mma.unsupported(variant, device) else Kernels.MMA


def features(variant: Variant, bucket: Bucket) -> dict[str, float]:
    """Return what the rule asks of a problem, what is likelier to matter first: sizes, then how products are made."""
    single = variant.dtype is Dtype.FP32
    return {
        "rows": variant.padded_rows,
        "cols": variant.padded_cols,
        "warps per SM": PER_SM[bucket] * variant.padded_rows * variant.padded_cols / 512,
        "programs per SM": PER_SM[bucket],
        "bits": 32 if single else 16,
        "tensor cores": not (single and variant.products is Fp32Products.IEEE),
        "heads per q": variant.total_heads // variant.heads.q,
    }


def leaf(tree: Mapping[str, Any], having: Mapping[str, float]) -> Mapping[str, Any]:
    """Return the leaf of a tree that serves a problem."""
    while "feature" in tree:
        tree = tree["yes" if having[tree["feature"]] <= tree["at most"] else "no"]
    return tree


def serving(
    tree: Mapping[str, Any], variant: Variant, device: Device, bucket: Bucket
) -> Iterator[Mma | Portable | Wgmma]:
    """Yield the valid schedules of the leaf that serves a problem, the preferred one first."""
    for written in leaf(tree, features(variant, bucket))["recipes"]:
        found = Recipe.read(written).at(variant, device)
        if not list(found.problems(variant, device)):
            yield found


@lru_cache(maxsize=1)
def rules() -> dict[str, Any]:
    """Return the rule of every arch that has one."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    return found


def learned_schedule(variant: Variant, device: Device, bucket: Bucket) -> Mma | Portable | Wgmma | None:
    """Return the rule's schedule for calls of a bucket; None where it has none."""
    rule = rules().get(device.arch)
    tree = rule["trees"].get(kernels_of(variant, device)) if rule else None
    return next(serving(tree, variant, device, bucket), None) if tree else None
