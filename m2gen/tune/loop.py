"""One search: candidates compile on the CPUs while one at a time runs on the GPU; the best of them meet in a final."""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol

from m2gen.errors import TuneError
from m2gen.pool import Lane, Service, finished
from m2gen.schedule import Schedule
from m2gen.tune.search import Proposal, Proposer
from m2gen.tune.select import Choice, choose
from m2gen.tune.space import Subject
from m2gen.tune.trial import Compiled, CompileTask, Measured, Samples, Step, Task, Trial

FINALISTS = 6
"""Of the screening, beside the default."""
ROUNDS = 8
FEWEST_ROUNDS = 3
FINALS_SECONDS = 25.0
"""Of the budget, or ``FINALS_PART`` of it where that is less."""
FINALS_PART = 0.3


class Ledger(Protocol):
    """Where a search's trials are kept: a journal of one worker, or a study that several share."""

    def trials(self) -> list[Trial]: ...
    def news(self) -> list[Trial]: ...
    def claim(self, schedule: Schedule) -> bool: ...
    def begin(self, schedule: Schedule) -> None: ...
    def record(self, trial: Trial) -> None: ...
    def release(self, schedule: Schedule) -> None: ...


@dataclass(frozen=True)
class Stations:
    """Where candidates go: the processes that compile, and the one that has the GPU."""

    compile: Service[CompileTask, Compiled]
    measure: Service[Task, Measured]
    compilers: int
    worker: str
    """Names who measures."""
    lane: Callable[[Service], Lane] = Lane  # type: ignore[type-arg]


@dataclass(frozen=True)
class Limits:
    """When a search ends."""

    seconds: float
    trials: int | None = None

    @property
    def screening(self) -> float:
        """Seconds of the budget before the final."""
        return self.seconds - min(FINALS_SECONDS, FINALS_PART * self.seconds)


@dataclass(frozen=True)
class Standing:
    """How far a search is."""

    done: int
    most: int
    best: Trial | None
    default_ms: float | None
    failures: Mapping[str, int]
    seconds_left: float


class Watcher(Protocol):
    """Whoever shows a search."""

    def stage(self, text: str) -> None: ...
    def trial(self, trial: Trial, standing: Standing) -> None: ...
    def details(self, text: str) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What a search found, and what it cost."""

    subject: Subject
    default: Schedule
    trials: tuple[Trial, ...]
    finals: Mapping[Schedule, Samples]
    choice: Choice | None
    """None where nothing passed, or the default did not."""
    points: int
    seconds: float
    compile_seconds: float
    """Of all compilers together."""
    interrupted: bool = False

    @property
    def gpu_seconds(self) -> float:
        return sum(trial.gpu_seconds for trial in self.trials)


@dataclass(order=True)
class _Ready:
    """A compiled candidate; what spills waits for what does not."""

    spills: bool
    number: int
    proposal: Proposal = field(compare=False)
    compiled: Compiled = field(compare=False)


class Search:
    """The search for the schedule of one subject."""

    def __init__(
        self, subject: Subject, proposer: Proposer, ledger: Ledger, stations: Stations, limits: Limits, watcher: Watcher
    ) -> None:
        self._subject, self._proposer, self._ledger, self._watcher = subject, proposer, ledger, watcher
        self._limits, self._stations = limits, stations
        self._start = time.monotonic()
        self._compilers = [stations.lane(stations.compile) for _ in range(stations.compilers)]
        self._gpu = stations.lane(stations.measure)
        self._compiling: dict[Schedule, Proposal] = {}
        self._ready: list[_Ready] = []
        self._running: _Ready | None = None
        self._copies: dict[str, list[_Ready]] = {}
        self._trials: dict[Schedule, Trial] = {}
        self._finals: dict[Schedule, Samples] = {}
        self._number = 0
        self._compile_seconds = 0.0
        self._interrupted = False

    def run(self, seed: int) -> Outcome:
        """Search until the limits, then hold the final; Ctrl-C ends either, and keeps what was verified."""
        points = self._proposer.left
        try:
            for trial in self._ledger.trials():
                self._learn(None, trial)
            self._screen()
            self._final(seed)
        except KeyboardInterrupt:
            self._interrupted = True
        finally:
            for lane in (*self._compilers, self._gpu):
                lane.stop()
            self._release()
        return self._outcome(points, seed)

    # Screening

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def _most(self) -> int:
        left = len(self._trials) + self._proposer.left + len(self._compiling) + len(self._ready)
        return left if self._limits.trials is None else min(left, self._limits.trials)

    def _screen(self) -> None:
        self._gpu.begin(Task(self._subject, self._proposer.default, Step.PREPARE))
        while True:
            over = self._elapsed > self._limits.screening
            if over:
                self._release()
            else:
                self._fill()
            busy = [lane for lane in (*self._compilers, self._gpu) if lane.task is not None]
            if not busy:
                return
            for lane in finished(busy, 1.0):
                task, result = lane.collect()
                if isinstance(task, CompileTask):
                    self._on_compiled(task.schedule, result)
                elif task.step is Step.PREPARE:
                    self._on_prepared(result)
                else:
                    self._on_measured(result)

    def _fill(self) -> None:
        """Give every idle station something to do."""
        for trial in self._ledger.news():
            self._learn(None, trial)
        for lane in self._compilers:
            if lane.task is None and len(self._ready) < len(self._compilers):
                proposal = self._ask()
                if proposal is None:
                    break
                self._compiling[proposal.schedule] = proposal
                lane.begin(CompileTask(self._subject, proposal.schedule))
        if self._gpu.task is None and self._ready:
            self._running = heapq.heappop(self._ready)
            schedule = self._running.proposal.schedule
            self._ledger.begin(schedule)
            self._gpu.begin(Task(self._subject, schedule, Step.SCREEN, self._best_ms))

    def _ask(self) -> Proposal | None:
        begun = len(self._trials) + len(self._compiling) + len(self._ready) + (self._running is not None)
        begun += sum(map(len, self._copies.values()))
        while self._limits.trials is None or begun < self._limits.trials:
            proposal = self._proposer.ask()
            if proposal is None or self._ledger.claim(proposal.schedule):
                return proposal
        return None

    def _release(self) -> None:
        """Give up what has not come to the GPU."""
        for lane in self._compilers:
            lane.stop()
        waiting = [ready.proposal.schedule for ready in chain(self._ready, *self._copies.values())]
        for schedule in (*self._compiling, *waiting):
            self._ledger.release(schedule)
        self._compiling.clear()
        self._ready.clear()
        self._copies.clear()

    def _on_prepared(self, found: Measured) -> None:
        if found.failure is not None:
            self._watcher.details(found.details)
            raise TuneError(f"the GPU worker cannot begin: {found.failure.message}")

    def _on_compiled(self, schedule: Schedule, compiled: Compiled) -> None:
        proposal = self._compiling.pop(schedule)
        self._compile_seconds += compiled.seconds
        self._number += 1
        if compiled.failure is not None:
            self._watcher.details(compiled.details)
            self._finish(proposal, Trial(schedule, proposal.origin, compiled, failure=compiled.failure))
            return
        ready = _Ready(compiled.spill_bytes > 0 and proposal.origin == "search", self._number, proposal, compiled)
        twin = next((t for t in self._trials.values() if t.compiled and t.compiled.binary == compiled.binary), None)
        pending = (*self._ready, *([self._running] if self._running else []))
        if twin is not None:
            self._finish(proposal, _copy(ready, twin))
        elif any(other.compiled.binary == compiled.binary for other in pending):
            self._copies.setdefault(compiled.binary, []).append(ready)
        else:
            heapq.heappush(self._ready, ready)

    def _on_measured(self, found: Measured) -> None:
        ready, self._running = self._running, None
        assert ready is not None
        self._watcher.details(found.details)
        trial = Trial(
            ready.proposal.schedule,
            ready.proposal.origin,
            ready.compiled,
            found.errors,
            found.samples,
            found.failure,
            found.seconds,
            self._stations.worker,
        )
        self._finish(ready.proposal, trial)
        for other in self._copies.pop(ready.compiled.binary, []):
            self._finish(other.proposal, _copy(other, trial))

    def _finish(self, proposal: Proposal, trial: Trial) -> None:
        self._ledger.record(trial)
        self._learn(proposal, trial)

    def _learn(self, proposal: Proposal | None, trial: Trial) -> None:
        self._trials[trial.schedule] = trial
        self._proposer.tell(proposal, trial)
        self._watcher.trial(trial, self._standing())

    # Results

    @property
    def _passed(self) -> list[Trial]:
        """Trials whose schedules may win, the fastest first."""
        passed = [trial for trial in self._trials.values() if trial.median_ms is not None and self._may_win(trial)]
        return sorted(passed, key=lambda trial: (trial.median_ms or 0.0, trial.schedule.slug))

    def _may_win(self, trial: Trial) -> bool:
        most = self._subject.max_bytes
        return most is None or (trial.samples is not None and trial.samples.peak_bytes <= most)

    @property
    def _best_ms(self) -> float | None:
        return next((trial.median_ms for trial in self._passed), None)

    def _standing(self) -> Standing:
        default = self._trials.get(self._proposer.default)
        failures = Counter(str(t.failure.reason) for t in self._trials.values() if t.failure)
        return Standing(
            len(self._trials),
            self._most,
            next(iter(self._passed), None),
            default.median_ms if default else None,
            failures,
            max(0.0, self._limits.seconds - self._elapsed),
        )

    # Final

    def _final(self, seed: int) -> None:
        """Gate the best on problems that no trial has seen, and time them and the default in turns."""
        default = self._trials.get(self._proposer.default)
        if default is None or default.median_ms is None:
            return
        chosen: list[Trial] = [default] if self._held_out(default) else []
        if not chosen:
            return
        for trial in self._passed:
            if len(chosen) > FINALISTS:
                break
            if trial is not default and not trial.copy_of and self._held_out(trial):
                chosen.append(trial)
        self._watcher.stage(f"final of {len(chosen)}")
        turns = random.Random(seed)
        for number in range(ROUNDS):
            if number >= FEWEST_ROUNDS and self._elapsed > self._limits.seconds:
                break
            turns.shuffle(chosen)
            for trial in list(chosen):
                if not self._turn(trial):
                    chosen.remove(trial)

    def _held_out(self, trial: Trial) -> bool:
        found = self._ask_gpu(Task(self._subject, trial.schedule, Step.HELD_OUT))
        return self._keep_final(trial, found)

    def _turn(self, trial: Trial) -> bool:
        found = self._ask_gpu(Task(self._subject, trial.schedule, Step.TIME))
        if not self._keep_final(trial, found):
            self._finals.pop(trial.schedule, None)
            return False
        assert found.samples is not None
        known = self._finals.get(trial.schedule)
        self._finals[trial.schedule] = found.samples if known is None else known + found.samples
        return True

    def _keep_final(self, trial: Trial, found: Measured) -> bool:
        """Take in what the final found of a trial; return whether it still stands."""
        known = self._trials[trial.schedule]
        errors = {error.tensor: error for error in known.errors}
        for error in found.errors:
            old = errors.get(error.tensor)
            if old is None or error.error * old.budget > old.error * error.budget:
                errors[error.tensor] = error
        every = tuple(errors[name] for name in sorted(errors))
        seconds = known.gpu_seconds + found.seconds
        self._trials[trial.schedule] = replace(known, errors=every, failure=found.failure, gpu_seconds=seconds)
        if found.failure is not None:
            self._watcher.details(found.details)
            self._ledger.record(self._trials[trial.schedule])
            self._watcher.trial(self._trials[trial.schedule], self._standing())
        return found.failure is None

    def _ask_gpu(self, task: Task) -> Measured:
        self._gpu.begin(task)
        while not finished([self._gpu]):
            pass
        found: Measured = self._gpu.collect()[1]
        return found

    def _outcome(self, points: int, seed: int) -> Outcome:
        default = self._proposer.default
        samples = dict(self._finals)
        if default not in samples:  # no final: what the screening found has to do
            samples = {trial.schedule: trial.samples for trial in self._screened() if trial.samples}
        eligible = {s: x for s, x in samples.items() if self._may_win(self._trials[s])}
        choice = choose(samples, eligible, default, seed) if default in samples and eligible else None
        return Outcome(
            self._subject,
            default,
            tuple(self._trials.values()),
            samples,
            choice,
            points,
            self._elapsed,
            self._compile_seconds,
            self._interrupted,
        )

    def _screened(self) -> Iterable[Trial]:
        """Return the default and the fastest of the screening, if the default passed."""
        default = self._trials.get(self._proposer.default)
        return [] if default is None or default.median_ms is None else [default, *self._passed[:FINALISTS]]


def _copy(ready: _Ready, twin: Trial) -> Trial:
    """Return the trial of a candidate whose machine code was measured under another name."""
    twin_slug = twin.copy_of or twin.schedule.slug
    return replace(
        twin,
        schedule=ready.proposal.schedule,
        origin=ready.proposal.origin,
        compiled=ready.compiled,
        gpu_seconds=0.0,
        copy_of=twin_slug,
    )
