"""Two tasks of memory: what must be known at the end was said long before, with noise around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CUE = 0
"""The letter that asks a copy for its next one."""


@dataclass(frozen=True)
class Task:
    """A task's name and letters: the cue, then noise, values and keys."""

    name: str
    items: int
    keys: int
    values: int
    noise: int

    def __post_init__(self) -> None:
        if self.name not in ("recall", "copy"):
            raise SystemExit(f"tasks must be of recall, copy, got {self.name!r}")
        if self.items > self.keys:
            raise SystemExit(f"items must be at most the {self.keys} keys, got {self.items}")

    @property
    def letters(self) -> int:
        """How many letters there are."""
        return 1 + self.noise + self.values + self.keys

    def draw(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return words (batch, length) and the values (batch, items) that are asked for at the last ``items`` letters.

        A recall has its pairs of a key and a value at random places, all keys different, and then asks for all of the
        keys in another order. A copy begins with its values and asks for them in their order.
        """
        if length < 4 * self.items:
            raise SystemExit(f"lengths must be at least 4 times the {self.items} items, got {length}")
        options = {"device": generator.device, "generator": generator}
        letters = 1 + torch.randint(self.noise, (batch, length), **options)
        answers = torch.randint(self.values, (batch, self.items), **options)
        if self.name == "copy":
            letters[:, : self.items] = 1 + self.noise + answers
            letters[:, -self.items :] = CUE
            return letters, answers
        keys = torch.rand(batch, self.keys, **options).argsort(1)[:, : self.items]
        places = 2 * torch.rand(batch, (length - self.items) // 2, **options).argsort(1)[:, : self.items]
        letters.scatter_(1, places, 1 + self.noise + self.values + keys)
        letters.scatter_(1, places + 1, 1 + self.noise + answers)
        order = torch.rand(batch, self.items, **options).argsort(1)
        letters[:, -self.items :] = 1 + self.noise + self.values + keys.gather(1, order)
        return letters, answers.gather(1, order)
