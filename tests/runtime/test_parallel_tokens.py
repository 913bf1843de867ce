"""The layer on two to four ranks of this host, which exchange tokens."""

from __future__ import annotations

from pathlib import Path

from ranks import launch
from shared_out import write_package
from support import ROOT


def test_tokens_over_ranks(tmp_path: Path) -> None:
    """Every check of ``layer_exchanged`` passes on two, three and four ranks; the last write what two read."""
    for ranks in (4, 3, 2):
        folder = tmp_path / str(ranks)
        write_package(folder)
        said = launch(ROOT / "tests" / "fakes" / "layer_exchanged.py", folder, ranks)
        assert said
        assert {name: failure for name, failure in said.items() if failure} == {}
