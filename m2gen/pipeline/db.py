"""The tuning database for commands: open it, and explain which records serve, are stale or superfluous."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from m2gen.bucket import BUCKETS, Bucket
from m2gen.db import (
    Database,
    Query,
    Record,
    Served,
    failures,
    flag,
    look_up,
    merged,
    slug,
    stale,
    usual_device,
    verdict,
)
from m2gen.device import detect, target
from m2gen.errors import UsageError, among
from m2gen.kernels.compile import triton_version
from m2gen.measure.context import recorded_name
from m2gen.pipeline.plan import open_spec, relevant, shipped_database
from m2gen.schedule.tunable import Tunable, keys_of
from m2gen.spec import Objective
from m2gen.variant import BuiltVariant, expand


def open_database(folder: Path | None, *, new: bool = False) -> Database:
    """Return the database in ``folder``, which may be ``new``, or the shipped one.

    Raises UsageError if ``folder`` is missing, or is not a folder.
    """
    if folder is not None and not (folder.is_dir() or (new and not folder.exists())):
        raise UsageError(f"--db must be a folder, got {folder}")
    return shipped_database() if folder is None else Database(folder)


def state(record: Record) -> str:
    """Return whether a record failed, is stale or flagged, for tables; empty if it can be used."""
    if record.failure is not None:
        return f"failed: {record.failure.reason}"
    return stale(record) or flag(record, triton_version())


@dataclass(frozen=True)
class Question:
    """The question of ``m2gen db why``, about a layer of a spec or a variant's key."""

    name: str
    spec: str | None = None
    objective: Objective | None = None
    """Objective; if None that of the spec, or train without a spec."""
    batch: int | None = None
    """Number of sequences; every bucket if None."""
    arch: str | None = None
    device: str | None = None
    """Product name; if None the GPU at hand, or else the device that packages for the first target are built for."""


@dataclass(frozen=True)
class Answer:
    """The answer to one query, for a GPU with ``sm_count`` SMs."""

    query: Query
    sm_count: int
    served: Served


def why(database: Database, question: Question) -> list[Answer]:
    """Return the record that serves each bucket in question, and the reasons against every other record."""
    everything = database.records()
    asked = _asked(question, everything)
    arch, device, sm_count = _device(question, asked, everything)
    return [
        Answer(query, sm_count, look_up(asked.records, query))
        for tunable in asked.tunables
        for bucket in _buckets(question, tunable, sm_count)
        for query in [Query(tunable.key, asked.objective, arch, device, bucket)]
    ]


@dataclass(frozen=True)
class _Asked:
    """What the name in question is of, the objective, and the records and arches of a build of that."""

    tunables: tuple[Tunable, ...]
    objective: Objective
    records: tuple[Record, ...]
    arches: tuple[str, ...]


def _asked(question: Question, records: tuple[Record, ...]) -> _Asked:
    """Return what is asked about; without a spec, builds are for what has records.

    A layer's name is of its recurrences, and of the kernels around them that have records.
    """
    if question.spec is None:
        try:
            tunable = Tunable.parse(question.name)
        except ValueError as error:
            raise UsageError(f"a layer must come with the --spec that has it; a variant {error}") from error
        only = relevant(records, [BuiltVariant(tunable.variant, ())])
        arches = tuple(sorted({record.environment.arch for record in only}))
        return _Asked((tunable,), question.objective or Objective.TRAIN, only, arches)
    spec, _ = open_spec(question.spec)
    built = expand(spec)
    having = {record.key.variant for record in records}
    found = [Tunable.parse(key) for each in built for key in _keys(question.name, each, having)]
    if not found:
        raise UsageError(f"LAYER must be {among(spec.layers)}, or a variant, got {question.name!r}")
    objective = question.objective or spec.tuning.objective
    return _Asked(tuple(dict.fromkeys(found)), objective, relevant(records, built), spec.targets)


def _keys(name: str, built: BuiltVariant, having: Container[str]) -> list[str]:
    """Return the keys that a name stands for: itself, or a layer's recurrence and what has records around it."""
    every = keys_of(built.variant)
    if name in built.layers:
        return [key for key in every if key == built.variant.key or key in having]
    return [key for key in every if key == name]


def _buckets(question: Question, tunable: Tunable, sm_count: int) -> tuple[Bucket, ...]:
    if question.batch is None and tunable.kernel is None:
        return BUCKETS
    return (tunable.bucket(question.batch or 1, sm_count),)


def _device(question: Question, asked: _Asked, everything: Iterable[Record]) -> tuple[str, str, int]:
    """Return arch, product name and SM count of the GPU in question."""
    known = {r.environment.device: r.environment for r in everything if question.arch in (None, r.environment.arch)}
    here = detect()
    if question.device is not None:
        named = [where for where in known.values() if slug(question.device) == slug(where.device)]
        if not named and question.arch is None:
            devices = ", ".join(known) or "none"
            raise UsageError(f"--device must be of records ({devices}) or come with --target, got {question.device!r}")
        if named:
            return named[0].arch, named[0].device, named[0].sm_count
        assert question.arch is not None
        return question.arch, question.device, target(question.arch).sm_count
    if question.arch is None and here is not None:
        return here.arch, recorded_name(here), here.sm_count
    arch = question.arch or next(iter(asked.arches), "sm_90")
    usual = usual_device(asked.records, arch, asked.objective)
    return arch, usual, known[usual].sm_count if usual in known else target(arch).sm_count


@dataclass(frozen=True)
class Superfluous:
    """A record that can serve nothing any more, with the reason."""

    record: Record
    reason: str


def superfluous(records: Iterable[Record], *, failed: bool) -> list[Superfluous]:
    """Return the records that ``m2gen db prune`` removes: stale or outranked ones, with ``failed`` also failures."""
    records = tuple(records)
    kept = set(merged(records))
    known = failures(records)
    found = []
    for record in records:
        if record.failure is not None:
            reason = "a failure, which may then be tried again" if failed else stale(record)
        elif verdict(record) in known:
            reason = f"its kernels failed: record {known[verdict(record)].id}"
        else:
            reason = stale(record) or ("" if record in kept else "another record of its key is preferred")
        found += [Superfluous(record, reason)] if reason else []
    return found
