"""Sample in rounds, so that drift of clocks or other load affects all candidates alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Protocol, Self, TypeVar


class Summed(Protocol):
    """Samples that can be added to those of other rounds."""

    def __add__(self, other: Self, /) -> Self: ...


Item = TypeVar("Item")
Sampled = TypeVar("Sampled", bound=Summed)


def in_rounds(
    items: Iterable[Item],
    sample: Callable[[Item], Sampled | None],
    rounds: Iterable[int],
    seed: int,
) -> dict[Item, Sampled]:
    """Sample every item once a round, in an order drawn from ``seed``, and return the sums.

    An item whose ``sample`` returns None has failed: it is not sampled again, and not in the result.
    """
    order, left = random.Random(seed), list(items)
    found: dict[Item, Sampled] = {}
    for _ in rounds:
        order.shuffle(left)
        for item in list(left):
            now = sample(item)
            if now is None:
                left.remove(item)
                found.pop(item, None)
            else:
                found[item] = found[item] + now if item in found else now
    return found
