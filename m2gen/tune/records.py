"""Between searches and the database: what is tried first, what is not tried again, and what is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from m2gen import __version__
from m2gen.bucket import bucket_of
from m2gen.db import POLICY, Environment, Key, Provenance, Reason, Record, Sizes, Timing
from m2gen.db.rank import failures, preference, stale
from m2gen.kernels.render import kernel_hash
from m2gen.measure.statistics import estimate
from m2gen.schedule import Schedule, problems
from m2gen.schedule.heuristic import default
from m2gen.tune.book import Outcome
from m2gen.tune.space import Subject, fits, space_hash
from m2gen.tune.trial import KNOWN, Trial

LASTING = (Reason.HANG, Reason.CRASH, Reason.WRONG, Reason.LAUNCH)
"""Failures that a schedule has on every problem; memory is one problem's, or one limit's."""
NEIGHBOURS = 6
"""Most seeds from records of other problems, and from other GPUs."""


@dataclass(frozen=True)
class Bench:
    """Who searches, and how: what records say besides the result."""

    environment: Environment
    seed: int
    worker: str
    study: str


def key_of_subject(subject: Subject) -> Key:
    """Return the key that a subject's records answer."""
    bucket = bucket_of(subject.batch, subject.variant.total_heads, subject.device.sm_count)
    return Key(subject.variant.key, subject.objective, bucket, POLICY)


def seeds(subject: Subject, environment: Environment, records: Iterable[Record]) -> list[tuple[Schedule, str]]:
    """Return what is tried first, the default before all others.

    Then what the database has for this key and device, the records of the same arch nearest first (the same variant,
    then those of the same dims), and winners of other GPUs, as far as they are valid here and within the memory bound.
    Stale records count, too: kernels change more often than what makes a schedule fast, and a seed is tried, not used.
    """
    key, variant = key_of_subject(subject), subject.variant
    winners = [r for r in records if r.failure is None and r.key.objective is subject.objective]

    def distance(record: Record) -> tuple[object, ...]:
        same = record.key.variant == key.variant
        return (not same, abs(record.key.bucket.place - key.bucket.place), *preference(record))

    def usable(record: Record) -> bool:
        return not problems(variant, record.schedule, subject.device) and fits(subject, record.schedule)

    dims = f"k{variant.state_expansion}_v{variant.head_dim}_"
    alike = sorted((r for r in winners if r.key.variant.startswith(dims) and usable(r)), key=distance)
    here = [r for r in alike if r.environment.arch == environment.arch]
    exact = [r for r in here if r.key == key and r.environment.device == environment.device]
    near = [r for r in here if r not in exact][:NEIGHBOURS]
    far = [r for r in alike if r not in here][:NEIGHBOURS]
    groups = (("record", exact), ("similar", near), ("elsewhere", far))
    found = {default(variant, subject.device): "default"}
    for origin, group in groups:
        for record in group:
            found.setdefault(record.schedule, origin)
    return list(found.items())


def known_failures(subject: Subject, environment: Environment, records: Iterable[Record]) -> list[Trial]:
    """Return the trials that need not be made: schedules that failed on this device with this toolchain.

    Kernels that are rendered otherwise now did not fail: a stale failure excludes nothing, as in look-ups of records.
    """
    found = []
    for record in failures(records).values():
        same = (record.key.variant, record.environment.device, record.environment.triton) == (
            subject.variant.key,
            environment.device,
            environment.triton,
        )
        if same and record.environment.arch == environment.arch and not stale(record):
            found.append(Trial(record.schedule, KNOWN, failure=record.failure))
    return found


def records_of(outcome: Outcome, bench: Bench) -> list[Record]:
    """Return what a search adds to the database: the winner, and what must not be tried again."""
    return [*_winner(outcome, bench), *_failed(outcome, bench)]


def _provenance(outcome: Outcome, bench: Bench, schedule: Schedule, worker: str) -> Provenance:
    kernel = kernel_hash(outcome.subject.variant, schedule)
    trials = max(1, len(outcome.trials))
    return Provenance(kernel, space_hash(), __version__, bench.seed, trials, worker or bench.worker, bench.study)


def _winner(outcome: Outcome, bench: Bench) -> Iterator[Record]:
    if outcome.choice is None:
        return
    subject, schedule = outcome.subject, outcome.choice.winner
    trial = next(trial for trial in outcome.trials if trial.schedule == schedule)
    samples = outcome.finals[schedule]
    forward = estimate(samples.forward_ms, bench.seed).median_ms
    backward = estimate(samples.backward_ms, bench.seed).median_ms if samples.backward_ms else None
    estimates = outcome.choice.estimates
    timing = Timing(estimates[schedule], estimates[outcome.default], forward, backward, samples.peak_bytes)
    yield Record(
        key_of_subject(subject),
        bench.environment,
        _provenance(outcome, bench, schedule, bench.worker),
        Sizes(subject.batch, subject.seq),
        schedule,
        timing,
        trial.errors,
    )


def _failed(outcome: Outcome, bench: Bench) -> Iterator[Record]:
    subject = outcome.subject
    for trial in outcome.trials:
        if trial.failure is not None and trial.failure.reason in LASTING and trial.origin != KNOWN:
            yield Record(
                key_of_subject(subject),
                bench.environment,
                _provenance(outcome, bench, trial.schedule, trial.worker),
                Sizes(subject.batch, subject.seq),
                trial.schedule,
                failure=trial.failure,
            )
