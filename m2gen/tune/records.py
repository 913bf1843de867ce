"""Exchange with the database: seeds of a search, failures not to repeat, and records to keep."""

from __future__ import annotations

from collections.abc import Iterable

from m2gen import __version__
from m2gen.db import LASTING, POLICY, Environment, Key, Provenance, Record, Sizes, Timing
from m2gen.db.rank import failures, preference
from m2gen.kernels.identity import identity_of
from m2gen.measure.context import Context
from m2gen.measure.statistics import estimate
from m2gen.schedule import AnySchedule
from m2gen.tune.log import Outcome
from m2gen.tune.space import fits, space_hash
from m2gen.tune.subject import Subject
from m2gen.tune.trial import KNOWN, Trial

NEIGHBOURS = 6
"""Most seeds from records of other problems, and from other GPUs."""


def key_of_subject(subject: Subject) -> Key:
    """Return the key that a subject's records answer."""
    return Key(subject.tunable.key, subject.objective, subject.bucket, POLICY)


def seeds(subject: Subject, environment: Environment, records: Iterable[Record]) -> list[tuple[AnySchedule, str]]:
    """Return the seeds of a search: schedules to try first, the default before all others.

    Then what the database has for this key and device, the records of the same arch nearest first (the same variant,
    then those of the same dims), and winners of other GPUs, as far as they are valid here and within the memory bound.
    Stale records count, too: kernels change more often than what makes a schedule fast, and a seed is tried, not used.
    What a GPU decides alone is as it is best on this one.
    """
    key, tunable = key_of_subject(subject), subject.tunable
    winners = [r for r in records if r.failure is None and r.key.objective is subject.objective]

    def distance(record: Record) -> tuple[object, ...]:
        same = record.key.variant == key.variant
        return (not same, abs(record.key.bucket.place - key.bucket.place), *preference(record))

    def usable(record: Record) -> bool:
        schedule = record.schedule.on(subject.device)
        return not tunable.problems(schedule, subject.device) and fits(subject, schedule)

    alike = sorted((r for r in winners if r.key.variant.startswith(tunable.kin) and usable(r)), key=distance)
    here = [r for r in alike if r.environment.arch == environment.arch]
    exact = [r for r in here if r.key == key and r.environment.device == environment.device]
    near = [r for r in here if r not in exact][:NEIGHBOURS]
    far = [r for r in alike if r not in here][:NEIGHBOURS]
    groups = (("record", exact), ("similar", near), ("elsewhere", far))
    found = {tunable.default(subject.device, key.bucket): "default"}
    for origin, group in groups:
        for record in group:
            found.setdefault(record.schedule.on(subject.device), origin)
    return list(found.items())


def known_failures(subject: Subject, environment: Environment, records: Iterable[Record]) -> list[Trial]:
    """Return the trials that need not be made: schedules that failed on this device with this toolchain.

    Kernels that are rendered otherwise now did not fail: a stale failure excludes nothing, as in look-ups of records.
    """
    found = []
    for record in failures(records).values():
        same = (record.key.variant, record.environment.device, record.environment.triton) == (
            subject.tunable.key,
            environment.device,
            environment.triton,
        )
        if same and record.environment.arch == environment.arch:
            found.append(Trial(record.schedule, KNOWN, failure=record.failure))
    return found


def records_of(outcome: Outcome, context: Context, seed: int, study: str) -> list[Record]:
    """Return what a search adds to the database: the winner, and what must not be tried again."""
    subject = outcome.subject
    timing = _timing(outcome, seed)

    def record(trial: Trial, worker: str, timing: Timing | None = None) -> Record:
        trials = max(1, sum(each.origin != KNOWN for each in outcome.trials))
        kernel = identity_of(subject.variant, trial.schedule)
        return Record(
            key_of_subject(subject),
            context.environment,
            Provenance(kernel, space_hash(subject.kernel), __version__, seed, trials, worker, study),
            Sizes(subject.batch, subject.seq),
            trial.schedule,
            timing,
            trial.errors if timing else (),
            None if timing else trial.failure,
            outcome.clocks if timing else None,
        )

    winner = outcome.choice and outcome.choice.winner
    best = [record(trial, context.worker, timing) for trial in outcome.trials if trial.schedule == winner]
    return best + [record(trial, trial.worker or context.worker) for trial in outcome.trials if _lasting(trial)]


def _lasting(trial: Trial) -> bool:
    """Whether a trial failed in a way that a schedule does on every problem, and no record says so yet."""
    return trial.failure is not None and trial.failure.reason in LASTING and trial.origin != KNOWN


def _timing(outcome: Outcome, seed: int) -> Timing | None:
    """Return what the winner's record says of its times; None where nothing won."""
    if outcome.choice is None:
        return None
    samples, estimates = outcome.finals[outcome.choice.winner], outcome.choice.estimates
    forward = estimate(samples.forward_ms, seed).median_ms
    backward = estimate(samples.backward_ms, seed).median_ms if samples.backward_ms else None
    tuned, base = estimates[outcome.choice.winner], estimates[outcome.default]
    return Timing(tuned, base, forward, backward, samples.peak_bytes)
