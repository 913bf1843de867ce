"""Time a panel of recipes on every workload of some specs, for ``m2gen db learn``: the same recipes on each.

A search dwells where one workload is fast, so that few schedules were timed on several. Candidates of all workloads
compile in parallel ahead of the GPU, which checks and times them as a search does, and trials go into the journals of
searches.

    python -m tools.time_panel FOLDER SECONDS tail.yaml h200.yaml
    python -m tools.time_panel FOLDER SECONDS learn.yaml tail.yaml h200.yaml docs/data/trials.jsonl

With trials of earlier runs, a workload that they have gets the schedule of the rule that is learned without it, unless
that was timed, and a new one those that are fastest on any workload with the same kernels.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m2gen import pipeline
from m2gen.errors import M2genError
from m2gen.kernels.lowering import Direction
from m2gen.measure import lock
from m2gen.measure.workers import finished
from m2gen.pipeline.goals import TuneRequest, goals
from m2gen.pipeline.tune import header_of, this_tuning_context
from m2gen.schedule import Schedule, default, problems
from m2gen.schedule.recipes import Recipe
from m2gen.tune import lessons
from m2gen.tune.learn import left_out
from m2gen.tune.ledger import open_ledger
from m2gen.tune.lessons import Lesson, Workplace
from m2gen.tune.search import best_combination
from m2gen.tune.services import Processes, TuningContext, processes_of
from m2gen.tune.space import CONSTRAINTS, Subject, fits
from m2gen.tune.trial import Compiled, CompileTask, Step, Task, Trial, go_on
from tools.panel import panel

FASTEST = 2
"""Recipes of each known workload that new ones get."""
COMBINATIONS = 3
"""Most pairs of separately timed kernels that are timed for each workload."""


def candidates(subject: Subject, known: Sequence[Lesson]) -> list[Schedule]:
    """Return the default and the panel's points of a search's space, or what is missing beside ``known`` trials."""
    variant, device = subject.variant, subject.device
    at = Workplace(variant, subject.batch, subject.seq, device)
    same = [lesson for lesson in known if lesson.at.kernels is at.kernels]
    for lesson in same:
        if lesson.at == at:  # the same on another GPU says nothing of this one
            choice = left_out(known, lesson)
            return [] if choice is None or lesson.ms(choice) is not None else [choice]
    recipes = [recipe for lesson in same for recipe in _fastest(lesson)] or panel(variant)
    found = dict.fromkeys(recipe.at(variant, device) for recipe in recipes)
    kept = [point for point in found if _searched(subject, point)]
    return list(dict.fromkeys([default(variant, device), *kept]))


def _fastest(lesson: Lesson) -> list[Recipe]:
    best = sorted(lesson.trials, key=lambda trial: trial.ms)[:FASTEST]
    return [Recipe.of(trial.schedule, lesson.at.variant) for trial in best]


def _searched(subject: Subject, point: Schedule) -> bool:
    if problems(subject.variant, point, subject.device) or not fits(subject, point):
        return False
    return not any(c.excludes(subject, point, side) for c in CONSTRAINTS for side in Direction)


class Panel:
    """The candidates of every workload, compiled in parallel, and timed one workload after the other."""

    def __init__(
        self, wanted: Mapping[Subject, Sequence[Schedule]], folder: Path, context: TuningContext, seconds: float
    ) -> None:
        subjects = [subject for subject, points in wanted.items() if points]
        self._waiting = deque(CompileTask(s, point) for s in subjects for point in wanted[s])
        self._left = {s: [task.schedule for task in self._waiting if task.subject == s] for s in subjects}
        self._compiled: dict[tuple[Subject, Schedule], Compiled] = {}
        self._trials: dict[Subject, list[Trial]] = {s: [] for s in subjects}
        self._deadline = time.monotonic() + seconds
        self._journals = {
            s: open_ledger(folder / f"{number:02}-{s.variant.key}.log", header_of(s, context), context.worker)
            for number, s in enumerate(subjects)
        }
        print(len(self._waiting), "candidates", flush=True)

    def run(self, processes: Processes) -> None:
        """Time every candidate, then the best pairs of a forward and a backward of different ones, while there is time.

        Combinations compile while other workloads are timed. Raises TuneError where this machine cannot go on.
        """
        try:
            for _ in range(1 + COMBINATIONS):
                for subject, points in self._left.items():
                    self._exhaust(subject, processes)
                    promising = best_combination(self._trials[subject], _Untried(subject, self._trials[subject]))
                    if promising is not None and promising not in points:
                        points.append(promising)
                        self._waiting.appendleft(CompileTask(subject, promising))
        finally:
            for journal in self._journals.values():
                journal.close()

    def _exhaust(self, subject: Subject, processes: Processes) -> None:
        """Time the candidates of a workload as they are compiled."""
        points = self._left[subject]
        while points and time.monotonic() < self._deadline:
            ready = next((p for p in points if (subject, p) in self._compiled), None)
            if ready is not None:
                points.remove(ready)
                self._time(subject, ready, processes)
            else:
                self._compile(processes, 1.0)
        best = min(filter(None, (trial.median_ms for trial in self._trials[subject])), default=None)
        print(f"{self._deadline - time.monotonic():.0f} s left", subject.variant.key, best, flush=True)

    def _compile(self, processes: Processes, seconds: float) -> None:
        for worker in processes.compilers:
            if worker.task is None and self._waiting:
                worker.begin(self._waiting.popleft())
        busy = [worker for worker in processes.busy if worker is not processes.gpu]
        for worker in finished(busy, seconds) if busy else ():
            task, result = worker.collect()
            go_on(result)
            self._compiled[task.subject, task.schedule] = result
        for worker in processes.compilers:
            if worker.task is None and self._waiting:
                worker.begin(self._waiting.popleft())

    def _time(self, subject: Subject, point: Schedule, processes: Processes) -> None:
        compiled = self._compiled[subject, point]
        if compiled.failure is not None:
            self._record(subject, Trial(point, "panel", compiled, failure=compiled.failure))
            return
        best = min(filter(None, (trial.median_ms for trial in self._trials[subject])), default=None)
        processes.gpu.begin(Task(subject, point, Step.SCREEN, best))
        while not finished([processes.gpu], 0.1):
            self._compile(processes, 0.0)
        found = processes.gpu.collect()[1]
        go_on(found)  # or candidates would count as tried that a full disk kept from it
        trial = Trial(point, "panel", compiled, found.errors, found.samples, found.failure, found.seconds)
        self._record(subject, trial)

    def _record(self, subject: Subject, trial: Trial) -> None:
        self._trials[subject].append(trial)
        self._journals[subject].record(trial)
        taken = trial.compiled and f"{trial.compiled.registers} registers, {trial.compiled.spill_bytes} spilt"
        print(subject.variant.key, trial.schedule.slug, trial.median_ms, trial.failure or "", taken, flush=True)


class _Untried:
    """The points of a search's space that no trial is about."""

    def __init__(self, subject: Subject, trials: list[Trial]) -> None:
        self._subject, self._tried = subject, {trial.schedule for trial in trials}

    def __contains__(self, point: Any) -> bool:
        return point not in self._tried and _searched(self._subject, point)


def parsed(arguments: Sequence[str] | None = None) -> tuple[Path, float, list[str], list[Path]]:
    """Return the folder of journals, the seconds, the specs, and the files of earlier trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the journals")
    parser.add_argument("seconds", type=float, metavar="SECONDS", help="for compiling and timing together")
    parser.add_argument("files", nargs="+", metavar="FILE", help="a spec (*.yaml), or earlier trials (*.jsonl, *.log)")
    given = parser.parse_args(arguments)
    specs = [name for name in given.files if name.endswith(".yaml")]
    trials = [name for name in given.files if name.endswith((".jsonl", ".log"))]
    if other := [name for name in given.files if name not in (*specs, *trials)]:
        parser.error(f"FILE must end in .yaml, .jsonl or .log, got {', '.join(other)}")
    if not specs:
        parser.error(f"FILE... must have a spec, got {', '.join(given.files)}")
    return given.folder, given.seconds, specs, [Path(name) for name in trials]


def main() -> None:
    """Time the panel on the workloads of the given specs."""
    folder, seconds, specs, trials = parsed()
    known = lessons.read(trials)
    context = this_tuning_context("tools.time_panel")
    request = TuneRequest(pipeline.open_database(None))
    subjects: dict[Subject, None] = {}
    for spec in specs:
        for goal in goals(pipeline.plan(spec, None, ()), request, context.device):
            subjects.setdefault(goal.subject)
    with lock.exclusive(context.gpu), processes_of(context.services) as processes:
        Panel({s: candidates(s, known) for s in subjects}, folder, context, seconds).run(processes)


if __name__ == "__main__":
    try:
        main()
    except M2genError as error:
        sys.exit(str(error))
