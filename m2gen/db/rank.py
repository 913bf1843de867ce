"""Rank records, and say which can serve at all: for look-up, merging and pruning alike."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from functools import cache

from m2gen.bucket import Bucket
from m2gen.db.fields import LASTING, POLICY
from m2gen.db.record import Record
from m2gen.device import limits
from m2gen.kernels.identity import identity_of
from m2gen.schedule import AnySchedule
from m2gen.schedule.tunable import Tunable

TOOLS = ("triton", "ptxas", "torch", "driver")
"""What of a toolchain decides, the first that differs: fields of ``Environment``."""


def slot(record: Record) -> Hashable:
    """Return the identity of which a database holds one record: key, environment, and problem or failed schedule."""
    what = record.problem if record.failure is None else record.schedule
    return (record.key, record.environment, what)


def stale(record: Record) -> str:
    """Return why this m2gen cannot use a record on any GPU, or an empty string if it can."""
    if record.key.policy != POLICY:
        return f"stale: passed numerics policy {record.key.policy}, which is {POLICY} now"
    now = identity_of(record.tunable.variant, record.schedule)
    if record.provenance.kernel != now:
        return f"stale: measured kernels {record.provenance.kernel}, which are {now} now"
    return ""


def flag(record: Record, triton: str) -> str:
    """Return how a record's Triton differs from the one at hand, which is no reason not to use it."""
    known = record.environment.triton
    return f"measured with triton {known or 'unknown'}, here {triton}" if known != triton else ""


@cache
def _default(key: str, arch: str, bucket: Bucket) -> AnySchedule:
    return Tunable.parse(key).default(limits(arch), bucket)


def is_default(record: Record) -> bool:
    """Return whether the record's schedule would also serve without it."""
    return record.schedule == _default(record.key.variant, record.environment.arch, record.key.bucket)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d{1,9}", text))


def newest_first(record: Record) -> tuple[tuple[int, ...], ...]:
    """Return the toolchain's versions, negated so that later ones sort first."""
    parts = (getattr(record.environment, name) for name in TOOLS)
    return tuple((*(-number for number in _version(part)), 1) for part in parts)


def preference(record: Record) -> tuple[object, ...]:
    """Return the sort key of records of one key and device; the smallest is preferred.

    In order: kernels that are still rendered; a later toolchain; a smaller ``Timing.ratio``, since times of different
    problems do not compare; the default schedule; the smaller id.
    """
    ratio = record.timing.ratio if record.timing else 0.0
    return (bool(stale(record)), newest_first(record), ratio, not is_default(record), record.id)


def preference_in_slot(record: Record) -> tuple[object, ...]:
    """Return the sort key of records of one slot, whose times compare: they are of one problem on one GPU.

    Their ratios do not where the default schedule has changed in between: the better the new one, the worse the ratio.
    """
    time = record.timing.tuned.high_ms if record.timing else 0.0
    return (bool(stale(record)), time, not is_default(record), record.id)


def failures(records: Iterable[Record]) -> dict[Hashable, Record]:
    """Return the failures that still count by their ``verdict``, which disqualifies winners with the same one.

    Those of memory do not, which others may have had, or a larger problem needed.
    """
    lasting = (record for record in records if record.failure is not None and record.failure.reason in LASTING)
    return {verdict(record): record for record in lasting if not stale(record)}


def verdict(record: Record) -> Hashable:
    """Return what a failure is about: kernels on a device, compiled by one Triton, whatever the problem."""
    environment = record.environment
    return (record.key.variant, environment.arch, environment.device, environment.triton, record.provenance.kernel)
