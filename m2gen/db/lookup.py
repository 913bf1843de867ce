"""Look up the record that serves a call, and say why every other one does not: for builds and for explanations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from m2gen.bucket import Bucket
from m2gen.db.rank import TOOLS, failures, newest_first, preference, stale, verdict
from m2gen.db.record import Record
from m2gen.spec import Objective


class Tier(StrEnum):
    """How close a record is to the calls that it serves, from close to none."""

    EXACT = "exact"
    """The record has the call's bucket and device."""
    NEAREST = "nearest"
    """The record has the call's device, and of its buckets the nearest."""
    ARCH = "arch"
    """The record is of another device of the arch."""
    DEFAULT = "default"
    """No record can serve; the default schedule does."""


@dataclass(frozen=True)
class Query:
    """The calls for which a schedule is needed."""

    variant: str
    objective: Objective
    arch: str
    device: str
    """Product name of the GPU."""
    bucket: Bucket


@dataclass(frozen=True)
class Rejection:
    """A record of the variant that does not serve, and why."""

    record: Record
    reason: str


@dataclass(frozen=True)
class Served:
    """The answer to a query."""

    tier: Tier
    record: Record | None = None
    rejected: tuple[Rejection, ...] = ()
    """Records that could serve, in order of preference, then those that cannot."""


def usual_device(records: Iterable[Record], arch: str, objective: Objective) -> str:
    """Return the device of ``arch`` that packages are built for: the one with most usable winners, the first by name.

    A package must be the same on every machine, so the GPU at hand plays no part. Records of kernels around a
    recurrence count where there are no others. Usable is what ``look_up`` could serve.
    """
    records = tuple(records)
    known = failures(records)
    usable = [record for record in records if not _unusable(record, arch, objective, known)]
    recurrences = [record for record in usable if record.tunable.kernel is None]
    counts = Counter(record.environment.device for record in recurrences or usable)
    return min(counts, key=lambda device: (-counts[device], device), default=arch)


def look_up(records: Iterable[Record], query: Query) -> Served:
    """Return the record that serves ``query``, by tiers, and the reasons why others of the variant do not."""
    same = [record for record in dict.fromkeys(records) if record.key.variant == query.variant]
    known = failures(same)
    reasons = {record: _unusable(record, query.arch, query.objective, known) for record in same}
    usable = sorted((r for r in same if not reasons[r]), key=lambda record: _distance(record, query))
    winner = usable[0] if usable else None
    outranked = [Rejection(record, _outranked(record, usable[0], query)) for record in usable[1:]]
    others = [Rejection(record, reasons[record]) for record in same if reasons[record]]
    return Served(_tier(winner, query), winner, (*outranked, *others))


def _unusable(record: Record, arch: str, objective: Objective, known: dict[object, Record]) -> str:
    """Return why a record can serve no call of its variant for an arch and an objective, or an empty string."""
    if record.environment.arch != arch:
        return f"for {record.environment.arch}, not {arch}"
    if record.failure is not None:
        return f"records a failure: {record.failure.reason}"
    if record.key.objective != objective:
        return f"tuned for objective {record.key.objective}, not {objective}"
    return stale(record) or _known_failure(record, known)


def _known_failure(record: Record, known: dict[object, Record]) -> str:
    found = known.get(verdict(record))
    if found is None or found.failure is None:
        return ""
    return f"its kernels failed on this device: {found.failure.reason}, record {found.id}"


def _other_device(record: Record, query: Query) -> bool:
    return record.environment.device != query.device


def _bucket_distance(record: Record, query: Query) -> tuple[int, int]:
    """Return the distance of the record's bucket; of two at the same distance, that of fewer programs is nearer."""
    return abs(record.key.bucket.place - query.bucket.place), record.key.bucket.place


def _distance(record: Record, query: Query) -> tuple[object, ...]:
    return (_other_device(record, query), *_bucket_distance(record, query), *preference(record))


def _outranked(record: Record, winner: Record, query: Query) -> str:
    """Return which comparison of ``_distance`` the record lost."""
    if _other_device(record, query) != _other_device(winner, query):
        return f"of another device, {record.environment.device}"
    if _bucket_distance(record, query) != _bucket_distance(winner, query):
        return f"bucket {record.key.bucket} is further than {winner.key.bucket}"
    versions = (newest_first(record), newest_first(winner))
    for name, *both in zip(TOOLS, *versions, strict=True):
        mine, other = (getattr(r.environment, name) for r in (record, winner))
        if both[0] != both[1]:
            return f"measured with an earlier toolchain: {name} {mine or 'unknown'}, not {other or 'unknown'}"
    assert record.timing is not None
    assert winner.timing is not None
    if record.timing.ratio != winner.timing.ratio:
        return f"at most {record.timing.ratio:.3f} of the default's time, not {winner.timing.ratio:.3f}"
    return "ties, and the default schedule or the smaller id is preferred"


def _tier(record: Record | None, query: Query) -> Tier:
    if record is None:
        return Tier.DEFAULT
    if _other_device(record, query):
        return Tier.ARCH
    return Tier.EXACT if record.key.bucket is query.bucket else Tier.NEAREST
