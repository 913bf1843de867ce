"""Run one search: candidates compile on the CPUs while one at a time runs on the GPU; a final compares the best."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain

from m2gen.errors import TuneError
from m2gen.measure.workers import finished
from m2gen.schedule import AnySchedule
from m2gen.tune.final import FINALISTS, run_final
from m2gen.tune.log import Outcome, TrialLog
from m2gen.tune.search import EVERY, SEARCHED, Proposal, Proposer
from m2gen.tune.select import select
from m2gen.tune.services import Processes
from m2gen.tune.trial import Compiled, CompileTask, Measurement, Samples, Step, Task, Trial, go_on

POLL_SECONDS = 0.2
DEFAULT_SECONDS = 120.0
"""Longest that a search waits beyond its budget for the default schedule's time."""


@dataclass(order=True)
class _Ready:
    """A compiled candidate in the queue; those that spill come last, unless a seed proposed them."""

    spills: bool
    number: int
    proposal: Proposal = field(compare=False)
    compiled: Compiled = field(compare=False)


class Search:
    """A search for the fastest schedule of one subject."""

    def __init__(self, log: TrialLog, proposer: Proposer, processes: Processes, worker: str) -> None:
        self._log, self._proposer, self._processes, self._worker = log, proposer, processes, worker
        self._compiling: dict[AnySchedule, Proposal] = {}
        self._ready: list[_Ready] = []
        self._running: _Ready | None = None
        self._copies: dict[str, list[_Ready]] = {}
        self._adopted: list[Proposal] = []
        self._compiled = 0
        self._compile_seconds = 0.0

    def run(self, seed: int, known: Iterable[Trial] = ()) -> Outcome:
        """Search until the limits, then run the final; Ctrl-C ends either, and keeps the results so far.

        ``known`` are failures from the database, which are not tried again. The ledger has those alone that another
        worker gave up.
        """
        points, interrupted = self._proposer.left, False
        finals: dict[AnySchedule, Samples] = {}
        try:
            self._hear((*known, *self._log.ledger.trials()))
            self._screen()
            finals = run_final(self._log, self._ask_gpu, seed)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            self._release()
            self._processes.gpu.drop()
        return _outcome(self._log, finals, seed, (points, self._compile_seconds, interrupted))

    def _screen(self) -> None:
        self._processes.gpu.begin(Task(self._log.subject, self._log.default, Step.PREPARE))
        while True:
            over = self._over
            # others are asked about before their candidates are adopted: what they give up in between is found
            done = over or not (self._processes.busy or self._log.ledger.pending())
            if over:
                self._release()
            else:
                self._fill()
            busy = self._processes.busy
            if done and not busy:
                self._hear(self._log.ledger.unseen())  # the default may be one that another worker has just tried
                return
            if not busy:
                time.sleep(POLL_SECONDS)  # other workers still hold candidates, which they may finish or abandon
            for worker in finished(busy, 1.0) if busy else ():
                task, result = worker.collect()
                go_on(result)
                if isinstance(task, CompileTask):
                    self._on_compiled(task.schedule, result)
                elif task.step is Step.PREPARE:
                    self._on_prepared(result)
                else:
                    self._on_measured(result)

    @property
    def _over(self) -> bool:
        """Whether the screening's time is up, which needs the default's time, unless that takes too long.

        The default waits for the first process on the GPU and for the oracle, which can take longer than a short
        budget, or another worker may hold it.
        """
        late = self._log.elapsed - self._log.limits.screening
        return late > 0 and (self._log.default in self._log.trials or late > DEFAULT_SECONDS)

    def _fill(self) -> None:
        """Give every idle worker a task."""
        self._hear(self._log.ledger.news())
        for compiler in self._processes.compilers:
            if compiler.task is None and len(self._ready) < len(self._processes.compilers):
                proposal = self._ask()
                if proposal is None:
                    break
                self._compiling[proposal.schedule] = proposal
                compiler.begin(CompileTask(self._log.subject, proposal.schedule))
        if self._processes.gpu.task is None and self._ready:
            self._running = heapq.heappop(self._ready)
            schedule = self._running.proposal.schedule
            self._log.ledger.begin(schedule)
            self._processes.gpu.begin(Task(self._log.subject, schedule, Step.SCREEN, self._log.best_ms))

    @property
    def _underway(self) -> int:
        """Number of candidates that were proposed and are not trials yet."""
        copies = sum(map(len, self._copies.values()))
        return len(self._compiling) + len(self._ready) + (self._running is not None) + copies

    @property
    def _full(self) -> bool:
        """Whether there are as many trials as the search may have."""
        most = self._log.limits.trials
        return most is not None and self._log.tried + self._underway >= most

    def _ask(self) -> Proposal | None:
        if self._full:  # what others give up is for who has trials left, and not to be waited for
            self._log.ledger.take_back()
            return None
        for schedule in self._log.ledger.adopt():
            self._proposer.skip(schedule)
            known = self._log.known_failure(schedule)
            if known is None:
                self._adopted.append(Proposal(schedule, "adopted"))
            else:
                self._log.ledger.record(known)
        while not self._full:
            if self._adopted:
                return self._adopted.pop()
            proposal = self._proposer.ask()
            if proposal is None or self._log.ledger.claim(proposal.schedule):
                return proposal
        return None

    def _release(self) -> None:
        """Give up the candidates that have not reached the GPU."""
        for compiler in self._processes.compilers:
            compiler.drop()
        waiting = [ready.proposal.schedule for ready in chain(self._ready, *self._copies.values())]
        adopted = [proposal.schedule for proposal in self._adopted]
        for schedule in (*self._compiling, *waiting, *adopted):
            self._log.ledger.release(schedule)
        self._compiling.clear()
        self._ready.clear()
        self._copies.clear()
        self._adopted.clear()

    def _on_prepared(self, found: Measurement) -> None:
        if found.failure is not None:
            self._log.watcher.details(found.details)
            raise TuneError(f"the GPU worker cannot begin: {found.failure.message}")

    def _on_compiled(self, schedule: AnySchedule, compiled: Compiled) -> None:
        proposal = self._compiling.pop(schedule)
        self._compile_seconds += compiled.seconds
        self._compiled += 1
        if compiled.failure is not None:
            self._log.watcher.details(compiled.details)
            self._finish(proposal, Trial(schedule, proposal.origin, compiled, failure=compiled.failure))
            return
        spills = compiled.spill_bytes > 0 and proposal.origin in (SEARCHED, EVERY)  # seeds are tried regardless
        ready = _Ready(spills, self._compiled, proposal, compiled)
        twin = next((t for t in self._log.trials.values() if t.compiled and t.compiled.binary == compiled.binary), None)
        pending = (*self._ready, *([self._running] if self._running else []))
        if twin is not None:
            self._finish(proposal, _copy(ready, twin))
        elif any(other.compiled.binary == compiled.binary for other in pending):
            self._copies.setdefault(compiled.binary, []).append(ready)
        else:
            heapq.heappush(self._ready, ready)

    def _on_measured(self, found: Measurement) -> None:
        ready, self._running = self._running, None
        assert ready is not None
        self._log.watcher.details(found.details)
        trial = Trial(
            ready.proposal.schedule,
            ready.proposal.origin,
            ready.compiled,
            found.errors,
            found.samples,
            found.failure,
            found.seconds,
            self._worker,
        )
        self._finish(ready.proposal, trial)
        for other in self._copies.pop(ready.compiled.binary, []):
            self._finish(other.proposal, _copy(other, trial))

    def _finish(self, proposal: Proposal, trial: Trial) -> None:
        self._log.ledger.record(trial)
        self._learn(proposal, trial)

    def _hear(self, trials: Iterable[Trial]) -> None:
        """Learn trials of the database, of earlier runs or of other workers."""
        for trial in trials:
            self._learn(None, trial)

    def _learn(self, proposal: Proposal | None, trial: Trial) -> None:
        self._proposer.tell(proposal, trial)
        begun = self._log.tried + self._proposer.left + self._underway
        self._log.most = min(begun, self._log.limits.trials or begun)
        self._log.learn(trial)

    def _ask_gpu(self, task: Task) -> Measurement:
        found: Measurement = self._processes.gpu.ask(task)
        go_on(found)
        return found


def _outcome(log: TrialLog, finals: dict[AnySchedule, Samples], seed: int, cost: tuple[int, float, bool]) -> Outcome:
    """Choose the winner among finalists, or without a final among the fastest of the screening."""
    samples = finals
    if log.default not in samples:
        screened = [log.baseline, *log.passed[:FINALISTS]] if log.baseline else []
        samples = {trial.schedule: trial.samples for trial in screened if trial and trial.samples}
    eligible = [schedule for schedule in samples if log.may_win(log.trials[schedule])]
    choice = select(samples, eligible, log.default, seed) if log.default in samples and eligible else None
    points, compile_seconds, interrupted = cost
    trials = tuple(log.trials.values())
    return Outcome(log.subject, log.default, trials, samples, choice, points, log.elapsed, compile_seconds, interrupted)


def _copy(ready: _Ready, twin: Trial) -> Trial:
    """Return the trial of a candidate with the same machine code as ``twin``, which was measured."""
    twin_slug = twin.copy_of or twin.schedule.slug
    return replace(
        twin,
        schedule=ready.proposal.schedule,
        origin=ready.proposal.origin,
        compiled=ready.compiled,
        gpu_seconds=0.0,
        copy_of=twin_slug,
    )
