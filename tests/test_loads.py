"""When the backward loads what comes next: the order of kernels that no interpreter runs, in those that it does.

One warp with explicit layouts loads a step's next operands once the step is done with this one's. Nothing in that order
depends on layouts, so portable kernels are rendered with it and run.
"""

from __future__ import annotations

from typing import Any

import pytest
from calls import assert_close, differentiate
from support import build_package, import_package, make_schedule, make_variant

from m2gen.device import TARGETS
from m2gen.kernels import render
from m2gen.kernels.loads import backward_words
from m2gen.problem import Problem, make_inputs
from m2gen.schedule.heuristic import default

EXPLICIT = make_variant(64, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx")
CHUNKS = {"one_level": (2, 2), "two_levels": (4, 2), "chunks_of_four": (8, 4), "odd": (6, 3)}
"""Steps between checkpoints, and of a chunk."""
LENGTHS = (1, 2, 3, 4, 5, 8, 9, 17)
PROBLEMS = (
    *(Problem(1, length, initial_state=True) for length in LENGTHS),
    Problem(0, 0, lengths=(0, 1, 0, 9, 2, 0), initial_state=True),
)


def as_freed(*_: Any) -> dict[str, object]:
    """Return the words of a kernel that loads into registers as they become free."""
    schedule = default(EXPLICIT, TARGETS["sm_90"])
    return backward_words(EXPLICIT, schedule)


def test_it_is_another_order() -> None:
    """The kernels below would show nothing if their words were those that they have anyway."""
    words = as_freed()
    assert words["loads_freed"]
    assert words["loads_late"]
    assert words["loads_last"]
    assert not words["loads_first"]
    plain = backward_words(make_variant(), make_schedule("atomic"))
    assert plain["loads_first"]
    assert not plain["loads_freed"]


@pytest.mark.parametrize("clip", ["carry", "total"])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_results_are_those_of_the_reference(tmp_path, monkeypatch, chunks: str, clip: str, device) -> None:
    """Every gradient at every length around a chunk, an interval and two of them, single and packed."""
    interval, chunk = CHUNKS[chunks]
    monkeypatch.setattr(render, "backward_words", as_freed)
    variant = make_variant(9, 9, (1, 1, 2, 2, 2), clip=clip)
    schedule = make_schedule("partial", interval=interval, unroll=interval if interval < 8 else 4, chunk=chunk)
    name = f"freed_{chunks}_{clip}"
    package = import_package(tmp_path / name, build_package(name, [variant], schedule))
    for problem in PROBLEMS:
        inputs = make_inputs(variant, problem, seed=7).to(device)
        found = differentiate(package.m2rnn, inputs)
        assert_close(found, differentiate(package.m2rnn, inputs, backend="reference"), 2e-5)
