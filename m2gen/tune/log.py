"""The trials of a search so far and its progress, shared by the screening and the final."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from m2gen.db import Clocks
from m2gen.schedule import AnySchedule, parse_any
from m2gen.tune.ledger import Ledger
from m2gen.tune.select import Selection
from m2gen.tune.space import fits
from m2gen.tune.subject import Subject
from m2gen.tune.trial import KNOWN, Measurement, Samples, Trial

FINALS_SECONDS = 25.0
"""Seconds of the budget that the final gets, or ``FINALS_PART`` of it if that is less."""
FINALS_PART = 0.3


@dataclass(frozen=True)
class Limits:
    """The limits at which a search ends."""

    seconds: float
    trials: int | None = None
    now: Callable[[], float] = time.monotonic
    """The clock by which ``seconds`` pass."""

    @property
    def screening(self) -> float:
        """Seconds of the budget before the final."""
        return self.seconds - min(FINALS_SECONDS, FINALS_PART * self.seconds)


@dataclass(frozen=True)
class SearchProgress:
    """The progress of a search."""

    done: int
    most: int
    best: Trial | None
    default_ms: float | None
    failures: Mapping[str, int]
    seconds_left: float


class Watcher(Protocol):
    """Shows the progress of a search."""

    def stage(self, text: str) -> None: ...
    def trial(self, trial: Trial, progress: SearchProgress) -> None: ...
    def details(self, text: str) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """The result of a search, and its cost."""

    subject: Subject
    default: AnySchedule
    trials: tuple[Trial, ...]
    finals: Mapping[AnySchedule, Samples]
    choice: Selection | None
    """The winner; None if the default failed or nothing may win."""
    points: int
    seconds: float
    compile_seconds: float
    """Time of all compilers together."""
    interrupted: bool = False
    clocks: Clocks | None = None
    """The GPU's clocks in the meantime; None if they are not known."""

    @property
    def gpu_seconds(self) -> float:
        return sum(trial.gpu_seconds for trial in self.trials)


class TrialLog:
    """The trials of one search, with the ledger that keeps them and the watcher that shows them."""

    def __init__(
        self, subject: Subject, default: AnySchedule, limits: Limits, ledger: Ledger, watcher: Watcher
    ) -> None:
        self.subject, self.default, self.limits = subject, default, limits
        self.ledger, self.watcher = ledger, watcher
        self.trials: dict[AnySchedule, Trial] = {}
        self._fitting: set[AnySchedule] = set()
        self.most = 0
        """Number of trials that the search will have."""
        self._start = limits.now()

    @property
    def elapsed(self) -> float:
        """Seconds since the search began."""
        return self.limits.now() - self._start

    def learn(self, trial: Trial) -> None:
        """Add a trial that the ledger already has; a copy is as wrong as the trial that was measured for it.

        One that passed before the database had a failure of its schedule does not count: its record would not serve.
        """
        if trial.failure is None:
            trial = self.known_failure(trial.schedule) or trial
        twin = self._twin(trial)
        if twin is not None and twin.failure is not None:
            trial = replace(trial, failure=twin.failure)
        self.trials[trial.schedule] = trial
        if trial.failure is not None:
            self._fail_copies(trial)
        if fits(self.subject, trial.schedule):
            self._fitting.add(trial.schedule)
        self.watcher.trial(trial, self.progress())

    def known_failure(self, schedule: AnySchedule) -> Trial | None:
        """Return the trial of a failure that the database has."""
        trial = self.trials.get(schedule)
        return trial if trial is not None and trial.origin == KNOWN else None

    def amend(self, trial: Trial, found: Measurement) -> Trial:
        """Add a result of the final to a trial, and record the trial if it failed after all."""
        known = self.trials[trial.schedule]
        errors = {error.tensor: error for error in known.errors}
        for error in found.errors:
            old = errors.get(error.tensor)
            if old is None or error.error * old.budget > old.error * error.budget:
                errors[error.tensor] = error
        every = tuple(errors[name] for name in sorted(errors))
        seconds = known.gpu_seconds + found.seconds
        amended = replace(known, errors=every, failure=found.failure, gpu_seconds=seconds)
        self.trials[trial.schedule] = amended
        if found.failure is not None:
            self.watcher.details(found.details)
            for failed in (amended, *self._fail_copies(amended)):
                self.ledger.record(failed)
                self.watcher.trial(failed, self.progress())
        return amended

    def _twin(self, trial: Trial) -> Trial | None:
        """Return the trial that was measured for a copy."""
        return self.trials.get(parse_any(trial.copy_of)) if trial.copy_of else None

    def _fail_copies(self, trial: Trial) -> list[Trial]:
        """Have the same machine code fail under every schedule that has it; return the trials that had passed."""
        every = self.trials.values()
        copies = [each for each in every if each.copy_of == trial.schedule.slug and each.failure is None]
        failed = [replace(copy, failure=trial.failure) for copy in copies]
        self.trials |= {copy.schedule: copy for copy in failed}
        return failed

    @property
    def tried(self) -> int:
        """Number of candidates that were tried, in this run or an earlier one; failures of the database were not."""
        return sum(trial.origin != KNOWN for trial in self.trials.values())

    @property
    def passed(self) -> list[Trial]:
        """Trials whose schedules may win, fastest first."""
        passed = [trial for trial in self.trials.values() if trial.median_ms is not None and self.may_win(trial)]
        return sorted(passed, key=lambda trial: (trial.median_ms or 0.0, trial.schedule.slug))

    def may_win(self, trial: Trial) -> bool:
        """Return whether a trial's memory is within the subject's bound, both estimated and measured.

        The default is tried even if it is not, as may be trials of earlier runs or of other workers.
        """
        if trial.schedule not in self._fitting or trial.samples is None:
            return False
        most = self._most_bytes
        return most is None or trial.samples.peak_bytes <= most

    @property
    def _most_bytes(self) -> float | None:
        """The largest measured peak that may win; None without a bound, or before the default's peak is known."""
        times, default = self.subject.times, self.trials.get(self.default)
        if times is None or default is None or default.samples is None:
            return self.subject.memory.size
        return times * default.samples.peak_bytes

    @property
    def baseline(self) -> Trial | None:
        """The default's trial if it passed."""
        trial = self.trials.get(self.default)
        return None if trial is None or trial.median_ms is None else trial

    @property
    def best_ms(self) -> float | None:
        return next((trial.median_ms for trial in self.passed), None)

    def progress(self) -> SearchProgress:
        """Return the progress of the search."""
        failures = Counter(str(trial.failure.reason) for trial in self.trials.values() if trial.failure)
        return SearchProgress(
            self.tried,
            self.most,
            next(iter(self.passed), None),
            self.baseline.median_ms if self.baseline else None,
            failures,
            max(0.0, self.limits.seconds - self.elapsed),
        )
