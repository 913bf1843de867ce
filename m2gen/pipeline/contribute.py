"""Records for others: what of a database is worth giving, and what it would change where it is merged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from m2gen.db import Query, Record, Served, failures, look_up, merged, stale, verdict
from m2gen.pipeline.db import Superfluous


@dataclass(frozen=True)
class Effect:
    """The record that serves the calls of a given one before and after the merge."""

    record: Record
    before: Served
    after: Served


@dataclass(frozen=True)
class Contribution:
    """Records to give, what each changes, and those that are kept back."""

    records: tuple[Record, ...]
    effects: tuple[Effect, ...]
    """One for each winner."""
    kept: tuple[Superfluous, ...]
    """Records as they are in the database, by whose ids they are found there."""


def anonymous(record: Record) -> Record:
    """Return a record without the name of the host that measured it; it has another id."""
    return replace(record, provenance=replace(record.provenance, worker=""))


def contribution(mine: Iterable[Record], theirs: Sequence[Record]) -> Contribution:
    """Return which of ``mine`` are worth giving to a database of ``theirs``.

    A record is kept back if nothing could use it: it is stale, it is of kernels that failed since, or theirs already
    has it, with the name of a host or without one, or prefers another of its slot.
    """
    given, kept = [], []
    there = set(map(anonymous, theirs))
    originals = {anonymous(record): record for record in mine}
    mine = tuple(originals)
    known, stays = failures((*mine, *theirs)), set(merged((*theirs, *mine)))
    for record in mine:
        reason = stale(record)
        if record.failure is None and verdict(record) in known:
            reason = f"its kernels failed: record {known[verdict(record)].id}"
        elif record in there:
            reason = "already there"
        elif not reason and record not in stays:
            reason = "another record of the same calls is preferred"
        given += [] if reason else [record]
        kept += [Superfluous(originals[record], reason)] if reason else []
    winners = [record for record in given if record.failure is None]
    effects = [_effect(record, theirs, (*theirs, *given)) for record in winners]
    return Contribution(tuple(given), tuple(effects), tuple(kept))


def _effect(record: Record, before: Sequence[Record], after: Sequence[Record]) -> Effect:
    key, here = record.key, record.environment
    query = Query(key.variant, key.objective, here.arch, here.device, key.bucket)
    return Effect(record, look_up(before, query), look_up(after, query))
