"""Check records again on the GPU at hand, or measure one again."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from m2gen.db import LASTING, Database, Estimate, Failure, Record, failures, stale, verdict
from m2gen.errors import UsageError, VerifyError
from m2gen.measure import lock
from m2gen.measure.rounds import in_rounds
from m2gen.measure.workers import run_isolated
from m2gen.pipeline.plan import Progress
from m2gen.schedule import AnySchedule
from m2gen.tune.final import ROUNDS
from m2gen.tune.select import select
from m2gen.tune.services import TuningContext
from m2gen.tune.subject import Subject
from m2gen.tune.trial import CompileTask, Measurement, Samples, Step, Task, go_on

SEED = 0
"""Seed of the order of rounds and of resampling."""


@dataclass(frozen=True)
class Recheck:
    """The result of checking a record again: why it was skipped, or what the check found."""

    record: Record
    skipped: str = ""
    found: Measurement | None = None

    @property
    def failed(self) -> bool:
        return self.found is not None and self.found.failure is not None


@dataclass(frozen=True)
class Replayed:
    """A record with its times of now."""

    record: Record
    tuned: Estimate
    default: Estimate
    faster: bool
    """Whether the record's schedule is faster than the default beyond noise, or is the default."""


def _subject(record: Record, context: TuningContext) -> Subject:
    tunable, sizes = record.tunable, (record.problem.batch, record.problem.seq)
    return Subject(tunable.variant, context.device, record.key.objective, *sizes, kernel=tunable.kernel)


def _elsewhere(record: Record, context: TuningContext) -> str:
    """Return why a record cannot be measured here, or an empty string."""
    here = context.environment
    if (record.environment.arch, record.environment.device) != (here.arch, here.device):
        return f"of another device: {record.environment.device}, here {here.device}"
    if record.failure is not None:
        return "records a failure"
    return "of a packed batch, not of equal sequences" if record.problem.lengths else stale(record)


def verify_records(database: Database, ids: Sequence[str], context: TuningContext, progress: Progress) -> list[Recheck]:
    """Check the winners of this device again, or only those of ``ids``, and add failures to the database.

    A record that fails serves no build from then on, whatever Triton measured it, and searches here do not try its
    schedule again. Running out of memory says nothing of a record: others may have had the GPU. Each failure is in the
    database before the next check begins.
    """
    every = database.records()
    asked = [database.find(prefix) for prefix in ids] if ids else [each for each in every if each.failure is None]
    known = failures(every)
    skipped = {record: _elsewhere(record, context) or _failed_before(record, known) for record in asked}
    chosen = [record for record in skipped if not skipped[record]]
    found: dict[Record, Measurement] = {}
    with lock.exclusive(context.gpu), closing(_checked(chosen, context, progress)) as checked:
        for records, result in checked:
            found |= dict.fromkeys(records, result)
            if result.failure is not None and result.failure.reason in LASTING:
                database.add(each for record in records for each in _failures(record, result.failure, context))
    return [Recheck(record, skipped[record], found.get(record)) for record in asked]


def _failed_before(record: Record, known: dict[object, Record]) -> str:
    failed = known.get(verdict(record))
    return f"its kernels failed already, record {failed.id}" if failed else ""


def _checked(
    records: Sequence[Record], context: TuningContext, progress: Progress
) -> Generator[tuple[list[Record], Measurement]]:
    """Yield records with the result of the whole check as it is known; equal tasks run once."""
    services = context.services
    tasks: dict[Task, list[Record]] = {}
    for record in records:
        tasks.setdefault(Task(_subject(record, context), record.schedule, Step.VERIFY), []).append(record)
    compiling = [[CompileTask(task.subject, task.schedule)] for task in tasks]
    progress.start("compile", len(compiling))
    for compiled, _ in run_isolated(compiling, services.compile, services.compilers):
        progress.advance(compiled.schedule.describe())
    progress.finish()
    progress.start("verify", len(compiling))
    for task, result in run_isolated([tasks], services.measure, 1):
        go_on(result)
        yield tasks[task], result
        progress.advance(task.schedule.describe())
    progress.finish()


def _failures(record: Record, failure: Failure, context: TuningContext) -> list[Record]:
    """Return the failure for searches with the toolchain at hand, and for the record, which may be of another."""
    here, provenance = context.environment, replace(record.provenance, worker=context.worker)
    failed = replace(record, provenance=provenance, timing=None, errors=(), failure=failure, clocks=None)
    bucket = record.tunable.bucket(record.problem.sequences, here.sm_count)  # one product name may be of several sizes
    found = replace(failed, key=replace(record.key, bucket=bucket), environment=here)
    if here.triton == record.environment.triton:
        return [found]
    return [found, replace(failed, failure=failure.noting(f", with triton {here.triton}"))]


def replay(record: Record, context: TuningContext, progress: Progress) -> Replayed:
    """Check a record's schedule and the default, and time both in rounds, as the search did.

    Raises UsageError for a record of another device, a stale one or a failure, and VerifyError if one of the two
    schedules fails now.
    """
    reason = _elsewhere(record, context)
    if reason:
        raise UsageError(f"record {record.id} must be one that can be measured here, got: {reason}")
    subject = _subject(record, context)
    base = subject.tunable.default(context.device, subject.bucket)
    schedules = list(dict.fromkeys((record.schedule, base)))
    with lock.exclusive(context.gpu):
        samples = _timed(subject, schedules, context, progress)
    found = select(samples, schedules, base, SEED)
    return Replayed(record, found.estimates[record.schedule], found.estimates[base], found.winner == record.schedule)


def _timed(
    subject: Subject, schedules: list[AnySchedule], context: TuningContext, progress: Progress
) -> dict[AnySchedule, Samples]:
    services = context.services
    tasks = [CompileTask(subject, schedule) for schedule in schedules]
    list(run_isolated([[task] for task in tasks], services.compile, services.compilers))
    gpu = services.start(services.measure)

    def ask(schedule: AnySchedule, step: Step) -> Measurement:
        found: Measurement = gpu.ask(Task(subject, schedule, step))
        progress.advance(f"{step} {schedule.describe()}")
        go_on(found)
        if found.failure is not None:
            raise VerifyError(f"{schedule.describe()}: {found.failure}")
        return found

    progress.start("replay", len(schedules) * (1 + ROUNDS))
    try:
        for schedule in schedules:
            ask(schedule, Step.VERIFY)
        return in_rounds(schedules, lambda schedule: ask(schedule, Step.TIME).samples, range(ROUNDS), SEED)
    finally:
        gpu.stop()
        progress.finish()
