"""Packages of layers that ranks share out, written for the processes that are the ranks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from support import SCHEDULES, build_package, make_variant

from m2gen.bucket import BUCKETS
from m2gen.device import PORTABLE
from m2gen.package import emit
from m2gen.package.directory import write
from m2gen.variant import BuiltVariant, Variant

SHARED = (1, 1, 4, 4, 4)
SHARE = (1, 1, 2, 2, 2)
SINGLE = (1,) * 5
"""Heads of all ranks, and of one of two and of four."""


def by_bucket(chosen: Iterable[Variant]) -> emit.Package:
    """Render a package whose first bucket is served by another schedule than all others."""
    served = (("two_level_atomic", BUCKETS[:1]), ("two_level_partial", BUCKETS[1:]))
    choices = [
        emit.Choice(BuiltVariant(variant, ("layer",)), PORTABLE, SCHEDULES[schedule], buckets=buckets)
        for variant in chosen
        for schedule, buckets in served
    ]
    return emit.package(emit.Origin("by_bucket", "by_bucket.yaml", "0" * 12), choices)


SHARES = [make_variant(9, 9, heads) for heads in (SHARED, SHARE)]


def write_package(folder: Path) -> None:
    """Write the package of the layers that are shared out."""
    others = [make_variant(9, 9, SHARED, "bf16"), make_variant(heads=(2,) * 5)]
    package = build_package("on_ranks", [*SHARES, make_variant(9, 9, SINGLE), *others], SCHEDULES["two_level_partial"])
    write(folder / "on_ranks", package.files)
