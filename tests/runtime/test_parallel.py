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


FAKES = ROOT / "tests" / "fakes"
SHARES = [make_variant(9, 9, heads) for heads in (SHARED, SHARE)]


def write_package(folder: Path) -> None:
    """Write the package of the layers that are shared out."""
    others = [make_variant(9, 9, SHARED, "bf16"), make_variant(heads=(2,) * 5)]
    package = build_package("on_ranks", [*SHARES, make_variant(9, 9, SINGLE), *others], SCHEDULES["two_level_partial"])
    write(folder / "on_ranks", package.files)


def test_the_layer_on_two_ranks(tmp_path: Path) -> None:
    """Every check of ``layer_on_ranks`` passes on both ranks, which start once for all of them."""
    write_package(tmp_path)
    write(tmp_path / "by_bucket", by_bucket(SHARES).files)
    said = launch(FAKES / "layer_on_ranks.py", tmp_path, RANKS)
    assert {name: failure for name, failure in said.items() if failure} == {}
    assert list(said) == list(CHECKS)


def test_tokens_over_ranks(tmp_path: Path) -> None:
    """Every check of ``layer_exchanged`` passes on two, three and four ranks; the last write what two read."""
    for ranks in (4, 3, 2):
        folder = tmp_path / str(ranks)
        write_package(folder)
        said = launch(FAKES / "layer_exchanged.py", folder, ranks)
        assert said
        assert {name: failure for name, failure in said.items() if failure} == {}
