"""A training state of a hybrid under FSDP that many ranks write is read by fewer, and by one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from ranks import launch
from support import ROOT, SCHEDULES, build_package, make_variant

from m2gen.package.directory import write

SCRIPT = ROOT / "tests" / "fakes" / "checkpoint_on_ranks.py"


@pytest.mark.parametrize("ranks", [(4, 2, 1), pytest.param((8, 4, 1), marks=pytest.mark.slow)], ids=str)
def test_fewer_ranks_read_what_more_wrote(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    """Parameters and the optimiser's state are those that were written, and the next step is the same."""
    package = build_package("on_ranks", [make_variant(9, 9, (1, 1, 4, 4, 4))], SCHEDULES["two_level_partial"])
    for before, count in pairwise((0, *ranks)):
        folder = tmp_path / f"{count}_after_{before}"
        write(folder / "on_ranks", package.files)
        said = launch(SCRIPT, folder, count)
        assert said
        assert {name: failure for name, failure in said.items() if failure} == {}
