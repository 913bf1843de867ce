"""The layer on two ranks of this host: heads sharded, sequences handed on, and FSDP."""

from __future__ import annotations

from pathlib import Path

from layer_on_ranks import CHECKS
from ranks import launch
from shared_out import SHARES, by_bucket, write_package
from support import ROOT

from m2gen.package.directory import write

RANKS = 2


def test_the_layer_on_two_ranks(tmp_path: Path) -> None:
    """Every check of ``layer_on_ranks`` passes on both ranks, which start once for all of them."""
    write_package(tmp_path)
    write(tmp_path / "by_bucket", by_bucket(SHARES).files)
    said = launch(ROOT / "tests" / "fakes" / "layer_on_ranks.py", tmp_path, RANKS)
    assert {name: failure for name, failure in said.items() if failure} == {}
    assert list(said) == list(CHECKS)
