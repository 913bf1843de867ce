"""Tokens for heads over ranks and back, slab by slab: of one rank's columns after the other, none waits for all.

Slabs (R, B, S_r, C) are this rank's tokens of every rank's columns, and the whole (B, S, C) is all tokens of its own.
Products write slabs and read them; sequences are sent from and into where they lie, so nothing is permuted. What a rank
keeps is written where it belongs, or copied while the rest is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from .collectives import copy, dense

MESSAGES = 16
"""Messages that a rank sends at most, one for each sequence and rank; more would take the host longer than a copy."""
HALVES = 2
"""Parts in which sequences are sent that are computed: one is under way while the other is computed."""


@dataclass(frozen=True)
class Route:
    """The ranks of a group, and the tokens of each sequence that each of them has."""

    group: ProcessGroup
    counts: tuple[int, ...]

    @property
    def ranks(self) -> int:
        return len(self.counts)

    @property
    def rank(self) -> int:
        return self.group.rank()


class _Exchange:
    """One exchange, of which each step is with the ranks that are so many places away."""

    def __init__(self, whole: Tensor, route: Route) -> None:
        self.route, self.batch = route, whole.shape[0]
        self.parts = torch.split(whole, list(route.counts), 1)
        self.joins = not 1 < self.batch <= MESSAGES // max(route.ranks - 1, 1)
        """Whether a rank's sequences are one message, which are copied unless they are one."""

    def at(self, step: int) -> int:
        """Return the rank so many places after this one."""
        return (self.route.rank + step) % self.route.ranks

    def pieces(self) -> list[slice]:
        """Return the sequences that are sent at once."""
        cuts = [0, self.batch] if self.joins else [self.batch * i // HALVES for i in range(HALVES + 1)]
        return [slice(first, last) for first, last in pairwise(cuts)]

    def begin(self, step: int, sent: Tensor, received: Tensor) -> Callable[[], None]:
        """Begin to send to the rank at a step and to receive from that as far before; return what waits for this."""
        there, here = (dense(sent), _room(received)) if self.joins else (sent, received)
        group = self.route.group

        def messages(x: Tensor, operation: Callable[..., Any], peer: int) -> list[distributed.P2POp]:
            parts = (x,) if self.joins else x.unbind()
            return [distributed.P2POp(operation, part, group=group, group_peer=peer) for part in parts if x.numel()]

        every = messages(there, distributed.isend, self.at(step)) + messages(here, distributed.irecv, self.at(-step))
        works = distributed.batch_isend_irecv(every) if every else []

        def finish() -> None:
            for work in works:
                work.wait()
            del every[:]  # which were kept until they had arrived
            if here is not received:
                copy(received, here)

        return finish


def _room(x: Tensor) -> Tensor:
    """Return x where its elements lie in order, or room for them."""
    return x if x.is_contiguous() else x.new_empty(x.shape)


def to_heads(
    fill: Callable[[Tensor, int, slice], object],
    whole: Tensor,
    route: Route,
    meanwhile: Callable[[], object] = lambda: None,
) -> Tensor:
    """Fill the whole (B, S, C) with slabs (B, S_r, C): this rank's goes where it belongs, others' are sent before.

    ``fill`` takes room for a slab's sequences, whose slab it is, and which sequences these are; ``meanwhile`` is called
    when all slabs are under way.
    """
    exchange, (batch, _, channels) = _Exchange(whole, route), whole.shape
    slabs = whole.new_empty(route.ranks - 1, batch, route.counts[route.rank], channels)
    waits: list[Callable[[], None]] = []
    for step, slab in enumerate(slabs, 1):
        for piece in exchange.pieces():
            fill(slab[piece], exchange.at(step), piece)
            waits.append(exchange.begin(step, slab[piece], exchange.parts[exchange.at(-step)][piece]))
    fill(exchange.parts[route.rank], route.rank, slice(None))
    meanwhile()
    for wait in waits:
        wait()
    return whole


def to_tokens(take: Callable[[Tensor, int], object], whole: Tensor, route: Route) -> Tensor:
    """Return the slabs (R, B, S_r, C) of the whole (B, S, C); ``take`` takes each as it arrives, this rank's first."""
    whole = whole.contiguous()
    exchange, (batch, _, channels) = _Exchange(whole, route), whole.shape
    slabs = whole.new_empty(route.ranks, batch, route.counts[route.rank], channels)
    steps = range(1, route.ranks)
    waits = [exchange.begin(step, exchange.parts[exchange.at(step)], slabs[exchange.at(-step)]) for step in steps]
    copy(slabs[route.rank], exchange.parts[route.rank])
    take(slabs[route.rank], route.rank)
    for step, wait in zip(steps, waits, strict=True):
        wait()
        take(slabs[exchange.at(-step)], exchange.at(-step))
    return slabs


def even_widths(columns: int, ranks: int) -> Sequence[slice]:
    """Return which of ``columns`` are each rank's."""
    each = columns // ranks
    return [slice(each * rank, each * (rank + 1)) for rank in range(ranks)]
