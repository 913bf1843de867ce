"""Word problems of permutation groups: a sequence of elements, and at every position their product so far."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = ("S3", "A5", "S5")


@dataclass(frozen=True)
class Group:
    """A group by its multiplication table: table[a, b] is a followed by b; element 0 is the identity.

    ``images`` (elements, points) says where each element takes each point.
    """

    name: str
    table: Tensor
    images: Tensor

    @property
    def order(self) -> int:
        """How many elements there are."""
        return self.table.shape[0]

    def to(self, device: torch.device) -> Group:
        """Return the group with its tables on a device."""
        return replace(self, table=self.table.to(device), images=self.images.to(device))

    def words(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw words (batch, length) and their products at every position; the generator is on the table's device."""
        letters = torch.randint(self.order, (batch, length), device=generator.device, generator=generator)
        return letters, products(letters, self.table)

    def generated(self, letters: list[int]) -> int:
        """Return how many elements are products of these."""
        found, new = {0}, [0]
        while new:
            new = [x for x in {int(self.table[a, b]) for a in new for b in letters} if x not in found]
            found.update(new)
        return len(found)


@dataclass(frozen=True)
class Answers:
    """What a model says: which element the product is; or, with ``points``, where it takes the first so many points.

    All points but one tell a permutation, and all but two an even one.
    """

    problem: Group
    points: int

    @property
    def classes(self) -> int:
        """How many logits that takes."""
        return self.points * self.problem.images.shape[1] if self.points else self.problem.order

    def losses(self, logits: Tensor, answers: Tensor) -> Tensor:
        """Return the cross entropy of each answer (...), of logits (..., classes)."""
        logits, wanted = self._split(logits, answers)
        losses = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none")
        return losses.view(*answers.shape, -1).sum(-1)

    def right(self, logits: Tensor, answers: Tensor) -> Tensor:
        """Return whether each answer is right, in all of its parts."""
        logits, wanted = self._split(logits, answers)
        return (logits.argmax(-1) == wanted).all(-1)

    def _split(self, logits: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        if not self.points:
            return logits[..., None, :], answers[..., None]
        return logits.unflatten(-1, (self.points, -1)), self.problem.images[answers][..., : self.points]


def products(letters: Tensor, table: Tensor) -> Tensor:
    """Return the product of every prefix, in as many gathers as the length has bits."""
    found, reach = letters, 1
    while reach < letters.shape[1]:
        found = torch.cat((found[:, :reach], table[found[:, :-reach], found[:, reach:]]), 1)
        reach *= 2
    return found


def _even(p: tuple[int, ...]) -> bool:
    return sum(p[i] > p[j] for i in range(len(p)) for j in range(i + 1, len(p))) % 2 == 0


def elements_of(name: str) -> list[tuple[int, ...]]:
    """Return the permutations of a symmetric group S<n>, or an alternating group A<n>; the identity is the first."""
    kind, size = name[:1], name[1:]
    if kind not in ("S", "A") or not size.isdecimal() or not 1 <= int(size) <= 6:
        raise SystemExit(f"groups must be S1 to S6 or A1 to A6, got {name!r}")
    return [p for p in permutations(range(int(size))) if kind == "S" or _even(p)]


def group(name: str) -> Group:
    """Return a symmetric or alternating group by name."""
    elements = elements_of(name)
    index = {p: i for i, p in enumerate(elements)}
    table = [[index[tuple(b[i] for i in a)] for b in elements] for a in elements]
    return Group(name, torch.tensor(table), torch.tensor(elements))


def alphabet(problem: Group, seed: int) -> Tensor:
    """Return the elements in an order whose first two generate the group, where any two do."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(100):
        order = torch.randperm(problem.order, generator=generator)
        if problem.generated(order[:2].tolist()) == problem.order:
            break
    return order
