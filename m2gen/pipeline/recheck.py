"""Check records again on the GPU at hand, or measure one again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from m2gen.db import Database, Estimate, Record, failures, stale, verdict
from m2gen.errors import UsageError, VerifyError
from m2gen.measure import lock
from m2gen.measure.rounds import in_rounds
from m2gen.measure.workers import run_isolated
from m2gen.pipeline.plan import Progress
from m2gen.schedule import AnySchedule
from m2gen.tune.final import ROUNDS
from m2gen.tune.records import LASTING
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
    if record.problem.lengths:
        raise UsageError(f"record {record.id} must be of equal sequences to be measured, got a packed batch")
    tunable, sizes = record.tunable, (record.problem.batch, record.problem.seq)
    return Subject(tunable.variant, context.device, record.key.objective, *sizes, kernel=tunable.kernel)


def _elsewhere(record: Record, context: TuningContext) -> str:
    """Return why a record cannot be measured here, or an empty string."""
    here = context.environment
    if (record.environment.arch, record.environment.device) != (here.arch, here.device):
        return f"of another device: {record.environment.device}, here {here.device}"
    return stale(record)


def verify_records(database: Database, ids: Sequence[str], context: TuningContext, progress: Progress) -> list[Recheck]:
    """Check the winners of this device again, or only those of ``ids``, and add failures to the database.

    A record that fails serves no build from then on, whatever Triton measured it, and searches here do not try its
    schedule again. Running out of memory says nothing of a record: others may have had the GPU.
    """
    asked = [database.find(prefix) for prefix in ids] if ids else list(database.records())
    winners = [record for record in asked if record.failure is None]
    known = failures(database.records())
    skipped = {record: _elsewhere(record, context) or _failed_before(record, known) for record in winners}
    chosen = [record for record in winners if not skipped[record]]
    with lock.exclusive(context.gpu):
        found = _checked(chosen, context, progress)
    broken = [record for record in chosen if (failure := found[record].failure) and failure.reason in LASTING]
    database.add(each for record in broken for each in _failures(record, found[record], context))
    return [Recheck(record, skipped[record], found.get(record)) for record in winners]


def _failed_before(record: Record, known: dict[object, Record]) -> str:
    failed = known.get(verdict(record))
    return f"its kernels failed already, record {failed.id}" if failed else ""


def _checked(records: Sequence[Record], context: TuningContext, progress: Progress) -> dict[Record, Measurement]:
    """Return the result of the whole check for each record; equal tasks run once."""
    services = context.services
    tasks = {record: Task(_subject(record, context), record.schedule, Step.VERIFY) for record in records}
    compiling = [[CompileTask(task.subject, task.schedule)] for task in dict.fromkeys(tasks.values())]
    progress.start("compile", len(compiling))
    for compiled, _ in run_isolated(compiling, services.compile, services.compilers):
        progress.advance(compiled.schedule.describe())
    progress.finish()
    progress.start("verify", len(compiling))
    measured: dict[Task, Measurement] = {}
    for task, result in run_isolated([list(dict.fromkeys(tasks.values()))], services.measure, 1):
        go_on(result)
        measured[task] = result
        progress.advance(task.schedule.describe())
    progress.finish()
    return {record: measured[task] for record, task in tasks.items()}


def _failures(record: Record, found: Measurement, context: TuningContext) -> list[Record]:
    """Return the failure for searches with the toolchain at hand, and for the record, which may be of another."""
    assert found.failure is not None
    here, provenance = context.environment, replace(record.provenance, worker=context.worker)
    failed = replace(
        record, environment=here, provenance=provenance, timing=None, errors=(), failure=found.failure, clocks=None
    )
    if here.triton == record.environment.triton:
        return [failed]
    message = f"{found.failure.message}, with triton {here.triton}"
    return [failed, replace(failed, environment=record.environment, failure=replace(found.failure, message=message))]


def replay(record: Record, context: TuningContext, progress: Progress) -> Replayed:
    """Check a record's schedule and the default, and time both in rounds, as the search did.

    Raises UsageError for a record of another device, a stale one or a failure, and VerifyError if one of the two
    schedules fails now.
    """
    reason = _elsewhere(record, context) or ("records a failure" if record.failure else "")
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
