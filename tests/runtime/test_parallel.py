"""The layer on two ranks of this host: heads sharded, sequences handed on, and FSDP."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from layer_on_ranks import CHECKS
from ranks import launch
from support import ROOT, SCHEDULES, build_package, make_variant

from m2gen.bucket import BUCKETS
from m2gen.device import PORTABLE
from m2gen.package import emit
from m2gen.package.directory import write
from m2gen.variant import BuiltVariant, Variant

RANKS = 2
SHARED = (1, 1, 4, 4, 4)
SHARE = (1, 1, 2, 2, 2)
"""SMs of one rank's GPU."""


def by_bucket(chosen: Iterable[Variant]) -> emit.Package:
    """Render a package whose first bucket is served by another schedule than all others."""
    served = (("two_level_atomic", BUCKETS[:1]), ("two_level_partial", BUCKETS[1:]))
    choices = [
        emit.Choice(BuiltVariant(variant, ("layer",)), PORTABLE, SCHEDULES[schedule], buckets=buckets)
        for variant in chosen
        for schedule, buckets in served
    ]
    return emit.package(emit.Origin("by_bucket", "by_bucket.yaml", "0" * 12), choices)


def test_the_layer_on_two_ranks(tmp_path: Path) -> None:
    """Every check of ``layer_on_ranks`` passes on both ranks, which start once for all of them."""
    shared = [make_variant(9, 9, heads) for heads in (SHARED, SHARE)]
    others = [make_variant(9, 9, SHARED, "bf16"), make_variant(heads=(2,) * 5)]
    package = build_package("on_ranks", [*shared, *others], SCHEDULES["two_level_partial"])
    write(tmp_path / "on_ranks", package.files)
    write(tmp_path / "by_bucket", by_bucket(shared).files)
    said = launch(ROOT / "tests" / "fakes" / "layer_on_ranks.py", tmp_path, RANKS)
    assert {name: failure for name, failure in said.items() if failure} == {}
    assert list(said) == list(CHECKS)
