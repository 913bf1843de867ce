"""Compare the best of a screening with the default: check them on held-out problems, time them in rounds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

from m2gen.measure.rounds import in_rounds
from m2gen.schedule import AnySchedule
from m2gen.tune.log import TrialLog
from m2gen.tune.trial import Measurement, Samples, Step, Task, Trial

FINALISTS = 6
"""Number of candidates from the screening that the final times beside the default."""
ROUNDS = 8
FEWEST_ROUNDS = 3

Ask = Callable[[Task], Measurement]


def run_final(log: TrialLog, ask: Ask, seed: int) -> dict[AnySchedule, Samples]:
    """Return the samples of the default and of the best that pass the held-out check; empty if the default failed.

    Rounds end with the budget, but not before ``FEWEST_ROUNDS``; the order within a round is drawn from ``seed``.
    """
    finalists = _finalists(log, ask)
    log.watcher.stage(f"final of {len(finalists)}")

    def sample(schedule: AnySchedule) -> Samples | None:
        found = ask(Task(log.subject, schedule, Step.TIME))
        return None if log.amend(log.trials[schedule], found).failure else found.samples

    def within_budget(number: int) -> bool:
        return number < FEWEST_ROUNDS or log.elapsed <= log.limits.seconds

    schedules = [trial.schedule for trial in finalists]
    return in_rounds(schedules, sample, takewhile(within_budget, range(ROUNDS)), seed)


def _finalists(log: TrialLog, ask: Ask) -> list[Trial]:
    """Return the default and the fastest candidates that pass the held-out check."""

    def passes(trial: Trial) -> bool:
        return log.amend(trial, ask(Task(log.subject, trial.schedule, Step.HELD_OUT))).failure is None

    default = log.baseline
    if default is None or not passes(default):
        return []
    finalists = [default]
    for trial in log.passed:
        if len(finalists) > FINALISTS:
            break
        if trial.schedule != log.default and not trial.copy_of and passes(trial):
            finalists.append(trial)
    return finalists
