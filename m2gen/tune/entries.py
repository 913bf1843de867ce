"""What the trials of a search's study say, and how those are named that this m2gen cannot read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from m2gen.errors import ScheduleError, TuneError
from m2gen.schedule import AnySchedule, parse_any
from m2gen.tune.claim import Claim
from m2gen.tune.storage import UNREADABLE, Made, SearchStorage
from m2gen.tune.study import RESULT, SCHEDULE, decode_trial
from m2gen.tune.trial import Trial

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

CLAIM = "claim"
"""Attribute of Optuna's trials that says who has the candidate."""
_CLAIM = TypeAdapter(Claim)


@dataclass(frozen=True)
class Entries:
    """The trials of a study that m2gen wrote."""

    place: SearchStorage
    study: Study

    def every(self) -> list[FrozenTrial]:
        """Return them in the study's order."""
        with self.place.errors():
            return [t for t in self.study.get_trials(deepcopy=False) if SCHEDULE in t.user_attrs]

    def of(self, schedule: AnySchedule) -> list[FrozenTrial]:
        """Return the trials that have a candidate or its result, in the study's order."""
        same = [frozen for frozen in self.every() if frozen.user_attrs[SCHEDULE] == schedule.slug]
        return [frozen for frozen in same if RESULT in frozen.user_attrs or not frozen.state.is_finished()]

    def result(self, frozen: FrozenTrial) -> Trial:
        """Return what a candidate came to; raises TuneError if it cannot be read, as the others do."""
        return self._read(frozen, RESULT, decode_trial)

    def schedule(self, frozen: FrozenTrial) -> AnySchedule:
        """Return the candidate of a trial."""
        return self._read(frozen, SCHEDULE, parse_any)

    def claim(self, frozen: FrozenTrial) -> Claim:
        """Return who has the candidate of a trial."""
        return self._read(frozen, CLAIM, _CLAIM.validate_python)

    def _read(self, frozen: FrozenTrial, attribute: str, parse: Callable[[Any], Made]) -> Made:
        try:
            return parse(frozen.user_attrs[attribute])
        except (*UNREADABLE, ScheduleError) as error:
            where = f"{self.place.shown}: trial {frozen.number} of study {self.study.study_name}"
            raise TuneError(f"{where} must be one that this m2gen reads; --fresh starts anew") from error
