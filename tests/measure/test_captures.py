"""Calls that stay captured on the GPU: of one group at a time, and without what a failed capture left."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from m2gen.measure.gpu import Captures


class Operands:
    """What a capture holds while it is made, as gigabytes of inputs."""


def test_a_capture_without_room_is_made_again_where_all_others_have_gone() -> None:
    """Neither the captures from before nor the operands of the one that failed are held by then."""
    held: list[weakref.ref[Operands]] = []
    captures: Captures[Operands] = Captures()
    held.append(weakref.ref(captures.get("first", Operands)))

    def capture() -> Operands:
        mine = Operands()
        if any(reference() is not None for reference in held):
            held.append(weakref.ref(mine))
            raise torch.OutOfMemoryError
        return mine

    assert isinstance(captures.get("second", capture), Operands)
    assert list(captures) == ["second"]
    assert len(held) == 2, "it failed once"


def test_captures_are_of_one_group_and_no_more_than_there_is_room_for() -> None:
    """The oldest goes for a new one; another group's go all at once, and those that are held are not made again."""
    made: list[str] = []

    def capture(name: str) -> Callable[[], str]:
        return lambda: made.append(name) or name.upper()

    captures: Captures[str] = Captures(2)
    captures.enter("group")
    assert [captures.get(name, capture(name)) for name in "aba"] == ["A", "B", "A"]
    assert (made, list(captures)) == (["a", "b"], ["a", "b"])
    assert captures.get("c", capture("c")) == "C"
    assert list(captures) == ["b", "c"]
    captures.enter("group")
    assert list(captures) == ["b", "c"]
    captures.enter("other")
    assert list(captures) == []
    assert captures.get("c", capture("c")) == "C"
    assert made == ["a", "b", "c", "c"]
