"""The ledger of a search: every trial is one of an Optuna study, so that a killed tuner resumes, and workers share.

A candidate is claimed by a running trial: of several that claim one, the first in the study's order has it. What a
worker gives up, or a worker that is gone leaves, waits in the study for the next who asks.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2gen.db import Failure, Reason
from m2gen.errors import TuneError
from m2gen.schedule import AnySchedule
from m2gen.tune.claim import Claim
from m2gen.tune.entries import CLAIM, Entries
from m2gen.tune.storage import HEARTBEAT_SECONDS, SearchStorage, open_database, open_journal, raced, retry
from m2gen.tune.study import RESULT, SEARCH, created, encode_trial, in_order, state_of
from m2gen.tune.trial import Trial

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Pace:
    """Seconds between the regular actions of a worker."""

    renew: float = HEARTBEAT_SECONDS
    poll: float = 1.0
    now: Callable[[], float] = time.monotonic


USUAL = Pace()


def open_ledger(storage: str | Path, search: Mapping[str, Any], worker: str, *, fresh: bool = False) -> Ledger:
    """Open or create a search in a journal's file, or in the database of a URL; ``fresh`` drops its earlier trials.

    ``search`` says what is tuned on what, and under ``study`` the name. Raises UsageError for a bad URL, and TuneError
    if the storage cannot be used.
    """
    place = open_journal(storage, fresh=fresh) if isinstance(storage, Path) else open_database(storage)
    return Ledger(place, search, worker, fresh=fresh)


class Ledger:
    """A search's trials; each is on disk before ``record`` returns."""

    def __init__(
        self, place: SearchStorage, search: Mapping[str, Any], worker: str, *, fresh: bool = False, pace: Pace = USUAL
    ) -> None:
        import optuna

        self._place, self._storage, self._pace = place, place.storage, pace
        self._here = Claim.of(worker)
        self._claims: dict[AnySchedule, int] = {}
        self._known: set[int] = set()
        self._recorded: set[AnySchedule] = set()
        self._polled = self._renewed = -math.inf
        name = str(search["study"])
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with place.errors():
            if fresh:
                self._forget(name)
            self._study = raced(
                lambda: optuna.create_study(storage=self._storage, study_name=name, load_if_exists=True)
            )
            self._entries = Entries(place, self._study)
            self._number = self._storage.get_study_id_from_name(name)
            if SEARCH not in self._study.user_attrs:
                self._study.set_user_attr(SEARCH, dict(search))

    def trials(self) -> list[Trial]:
        """Return the trials of all workers so far, in the order in which they ended."""
        self.take_back()
        return self.unseen()

    def news(self) -> list[Trial]:
        """Return the trials of other workers, at this worker's pace, and say that it lives."""
        now = self._pace.now()
        if now - self._renewed > self._pace.renew:
            self._renewed = now
            with self._place.errors():
                for number in self._claims.values():
                    self._place.beat(number)
        if now - self._polled < self._pace.poll:
            return []
        self._polled = now
        return self.unseen()

    def unseen(self) -> list[Trial]:
        """Return the trials that are new and that this worker did not record, however lately it looked."""
        ended = [t for t in self._entries.every() if RESULT in t.user_attrs and t.state.is_finished()]
        new = [frozen for frozen in in_order(ended) if frozen.number not in self._known]
        self._known.update(frozen.number for frozen in new)
        return [trial for trial in map(self._entries.result, new) if trial.schedule not in self._recorded]

    def adopt(self) -> list[AnySchedule]:
        """Claim and return the candidates that nobody has any more."""
        self.take_back()
        waiting = [frozen for frozen in self._entries.every() if frozen.state.name == "WAITING"]
        having = [(frozen, self._entries.schedule(frozen)) for frozen in waiting]
        return [schedule for frozen, schedule in having if self._resume(frozen, schedule)]

    def pending(self) -> int:
        """Return the number of candidates that other workers have."""
        mine = set(self._claims.values())
        return sum(frozen.state.name == "RUNNING" and frozen._trial_id not in mine for frozen in self._entries.every())

    def claim(self, schedule: AnySchedule) -> bool:
        """Claim a candidate; return False if another worker has it, or it was tried."""
        from optuna.trial import TrialState

        live = self._entries.of(schedule)
        if live:
            return live[0].state is TrialState.WAITING and self._resume(live[0], schedule)
        with self._place.errors():
            template = created(TrialState.RUNNING, schedule, {CLAIM: asdict(self._here)})
            number = self._storage.create_new_trial(self._number, template)
        return self._settle(number, schedule)

    def begin(self, schedule: AnySchedule) -> None:
        """Note that a candidate is about to run on the GPU, in case the machine goes down."""
        from optuna.exceptions import UpdateFinishedTrialError

        number = self._claims[schedule]
        with self._place.errors(), contextlib.suppress(UpdateFinishedTrialError):
            self._place.beat(number)
            self._storage.set_trial_user_attr(number, CLAIM, asdict(replace(self._here, begun=True)))

    def release(self, schedule: AnySchedule) -> None:
        """Give up a claim, so that any worker may take it."""
        from optuna.trial import TrialState

        if schedule in self._claims:
            self._ended(self._claims.pop(schedule), TrialState.WAITING)

    def record(self, trial: Trial) -> None:
        """Write a trial; a later one of the same candidate, from the final, is another that counts in its place."""
        self._recorded.add(trial.schedule)
        if trial.schedule in self._claims and self._finish(self._claims.pop(trial.schedule), trial):
            return
        state, values = state_of(trial)
        attributes = {RESULT: encode_trial(trial), CLAIM: asdict(self._here)}
        with self._place.errors():
            self._study.add_trial(created(state, trial.schedule, attributes, values))

    def close(self) -> None:
        """Give up what is claimed, if the storage allows it, and let go of the storage."""
        with contextlib.suppress(TuneError):
            for schedule in list(self._claims):
                self.release(schedule)
        self._place.close()

    def _settle(self, number: int, schedule: AnySchedule) -> bool:
        """Keep the claim of a running trial if no other of its candidate is before it."""
        from optuna.trial import TrialState

        with self._place.errors():
            self._place.beat(number)
        first = next(iter(self._entries.of(schedule)), None)
        if first is None or first._trial_id != number:
            self._ended(number, TrialState.FAIL)
            return False
        self._claims[schedule] = number
        return True

    def _resume(self, waiting: FrozenTrial, schedule: AnySchedule) -> bool:
        """Claim the candidate of a waiting trial; return False if another worker was quicker."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        number = waiting._trial_id
        try:
            with self._place.errors():
                if not self._storage.set_trial_state_values(number, TrialState.RUNNING):
                    return False
                self._storage.set_trial_user_attr(number, CLAIM, asdict(self._here))
        except UpdateFinishedTrialError:
            return False
        return self._settle(number, schedule)

    def take_back(self) -> None:
        """Leave the candidates of workers that are gone to whoever asks, but none that a machine went down with.

        Processes of this host are known to be gone, and whether its machine went down. Other workers that share a
        database are gone if they are silent; a journal has no heartbeats.
        """
        self._take_back_here()
        with self._place.errors():
            self._place.fail_stale(self._study)

    def _take_back_here(self) -> None:
        from optuna.trial import TrialState

        mine = set(self._claims.values())
        for frozen in self._entries.every():
            if frozen.state is not TrialState.RUNNING or frozen._trial_id in mine:
                continue
            claim = self._entries.claim(frozen)
            if not claim.gone(self._here):
                continue
            if RESULT in frozen.user_attrs:
                self._ended(frozen._trial_id, *state_of(self._entries.result(frozen)))
            elif claim.begun and claim.rebooted(self._here):
                failure = Failure(Reason.CRASH, "the machine went down while this candidate ran")
                self._finish(frozen._trial_id, Trial(self._entries.schedule(frozen), "resumed", failure=failure))
            elif self._ended(frozen._trial_id, TrialState.FAIL):
                with self._place.errors():
                    retry(self._study, frozen)

    def _finish(self, number: int, trial: Trial) -> bool:
        """Write the result into a running trial; return False if another worker has taken that back."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            with self._place.errors():
                self._storage.set_trial_user_attr(number, RESULT, encode_trial(trial))
        except UpdateFinishedTrialError:
            return False
        return self._ended(number, *state_of(trial))

    def _ended(self, number: int, state: Any, values: list[float] | None = None) -> bool:
        """Change a running trial's state; return False if another worker has taken it back."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            with self._place.errors():
                return self._storage.set_trial_state_values(number, state, values)
        except UpdateFinishedTrialError:
            return False

    def _forget(self, name: str) -> None:
        if name in [study.study_name for study in self._storage.get_all_studies()]:
            self._storage.delete_study(self._storage.get_study_id_from_name(name))
