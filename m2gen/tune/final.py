"""The best of a screening against the default: gated on new problems, timed in turns."""

from __future__ import annotations

import random
from collections.abc import Callable

from m2gen.schedule import Schedule
from m2gen.tune.book import Book
from m2gen.tune.trial import Measured, Samples, Step, Task, Trial

FINALISTS = 6
"""Of the screening, beside the default."""
ROUNDS = 8
FEWEST_ROUNDS = 3

Ask = Callable[[Task], Measured]


def hold_final(book: Book, ask: Ask, seed: int) -> dict[Schedule, Samples]:
    """Return the samples of the default and of the best that pass the held-out gate; none without a default.

    Rounds end with the budget, but not before ``FEWEST_ROUNDS``; the order within a round is drawn from ``seed``.
    """
    entered = _entrants(book, ask)
    book.watcher.stage(f"final of {len(entered)}")
    order, samples = random.Random(seed), dict[Schedule, Samples]()
    for number in range(ROUNDS if entered else 0):
        if number >= FEWEST_ROUNDS and book.elapsed > book.limits.seconds:
            break
        order.shuffle(entered)
        for trial in list(entered):
            found = ask(Task(book.subject, trial.schedule, Step.TIME))
            if book.amend(trial, found).failure or found.samples is None:
                entered.remove(trial)
                samples.pop(trial.schedule, None)
            else:
                known = samples.get(trial.schedule)
                samples[trial.schedule] = found.samples if known is None else known + found.samples
    return samples


def _entrants(book: Book, ask: Ask) -> list[Trial]:
    """Return the default and the fastest that pass the gate on problems that no trial has seen."""

    def passes(trial: Trial) -> bool:
        return book.amend(trial, ask(Task(book.subject, trial.schedule, Step.HELD_OUT))).failure is None

    default = book.baseline
    if default is None or not passes(default):
        return []
    entered = [default]
    for trial in book.passed:
        if len(entered) > FINALISTS:
            break
        if trial.schedule != book.default and not trial.copy_of and passes(trial):
            entered.append(trial)
    return entered
