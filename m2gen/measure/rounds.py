"""Times that are taken in rounds: whatever changes in the meantime, clocks or neighbours, changes for everyone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Protocol, Self, TypeVar


class Summed(Protocol):
    """Samples of one round, to which those of the next are added."""

    def __add__(self, other: Self, /) -> Self: ...


Entrant = TypeVar("Entrant")
Sampled = TypeVar("Sampled", bound=Summed)


def in_rounds(
    entrants: Iterable[Entrant],
    sample: Callable[[Entrant], Sampled | None],
    rounds: Iterable[int],
    seed: int,
) -> dict[Entrant, Sampled]:
    """Return the samples of every entrant, each once a round, in an order that is drawn from ``seed``.

    One without samples in a round, as it failed, takes part in no other and is not in the result.
    """
    order, left = random.Random(seed), list(entrants)
    found: dict[Entrant, Sampled] = {}
    for _ in rounds:
        order.shuffle(left)
        for entrant in list(left):
            now = sample(entrant)
            if now is None:
                left.remove(entrant)
                found.pop(entrant, None)
            else:
                found[entrant] = found[entrant] + now if entrant in found else now
    return found
