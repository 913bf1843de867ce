"""The layer on two ranks of this host: heads sharded, sequences handed on, and FSDP."""

from __future__ import annotations

from pathlib import Path

from layer_on_ranks import CHECKS
from ranks import launch
from support import SCHEDULES, build_package, make_variant

from m2gen import directory

RANKS = 2
SHARED = (1, 1, 4, 4, 4)


def test_the_layer_on_two_ranks(tmp_path: Path) -> None:
    """Every check of ``layer_on_ranks`` passes on both ranks, which start once for all of them."""
    heads = (SHARED, (1, 1, 2, 2, 2))  # whole, and one rank's share
    chosen = [*(make_variant(9, 9, count) for count in heads), make_variant(heads=(2,) * 5)]
    package = build_package("on_ranks", chosen, SCHEDULES["two_level_partial"])
    directory.write(tmp_path / "package", package.files)
    said = launch(Path(__file__).with_name("layer_on_ranks.py"), tmp_path, RANKS)
    assert {name: failure for name, failure in said.items() if failure} == {}
    assert list(said) == list(CHECKS)
