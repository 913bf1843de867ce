"""Samples in rounds: sums of what succeeds, an order that a seed decides, and nothing of what fails."""

from __future__ import annotations

from collections import Counter

import pytest

from m2gen.measure.rounds import in_rounds


@pytest.mark.parametrize("fails_in", [0, 1, 3])
def test_what_fails_in_any_round_is_out(fails_in: int) -> None:
    """An item that fails is asked no more, and what it gave in earlier rounds is dropped."""
    asked: Counter[str] = Counter()

    def sample(item: str) -> int | None:
        asked[item] += 1
        return None if item == "b" and asked[item] > fails_in else 1

    assert in_rounds("abc", sample, range(4), 0) == {"a": 4, "c": 4}
    assert asked == {"a": 4, "b": fails_in + 1, "c": 4}


def test_every_round_asks_each_once_in_an_order_of_its_own() -> None:
    """A seed decides the orders of all rounds, which differ."""

    def order(seed: int) -> list[str]:
        asked: list[str] = []
        in_rounds("abcdefgh", lambda item: asked.append(item) or 1, range(3), seed)
        return ["".join(asked[start : start + 8]) for start in range(0, 24, 8)]

    rounds = order(0)
    assert ["".join(sorted(each)) for each in rounds] == ["abcdefgh"] * 3
    assert len(set(rounds)) == 3
    assert order(0) == rounds != order(1)
