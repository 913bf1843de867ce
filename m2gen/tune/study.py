"""Trials of m2gen as trials of Optuna's studies, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from m2gen.schedule import AnySchedule
from m2gen.tune.coordinates import axes_of, choices, labels
from m2gen.tune.trial import Trial

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

FORM = "labels"
"""The form of trials; those of another form, as 0.2.0 had in databases, must not be in one study with them."""
SEARCH = "search"
"""Attribute of Optuna's studies that says what is tuned on what."""
SCHEDULE, RESULT = "schedule", "m2gen"
"""Attributes of Optuna's trials: the candidate's slug, and m2gen's trial."""
_TRIAL = TypeAdapter(Trial)


def encode_trial(trial: Trial) -> Any:
    """Return a trial as JSON values."""
    return _TRIAL.dump_python(trial, mode="json")


def decode_trial(value: Any) -> Trial:
    """Return a trial from JSON values; raises ValueError if they are not one."""
    return _TRIAL.validate_python(value)


def in_order(ended: list[FrozenTrial]) -> list[FrozenTrial]:
    """Return trials in the order in which they ended, which is that of the searches.

    None is before an earlier one of its candidate, in place of which it counts: dates are by clocks that are set back,
    and that differ between hosts.
    """
    latest: dict[str, datetime] = {}
    dates: dict[int, datetime] = {}
    for frozen in sorted(ended, key=lambda frozen: frozen.number):
        slug, date = frozen.user_attrs[SCHEDULE], frozen.datetime_complete
        assert date is not None, "it has ended"
        latest[slug] = dates[frozen.number] = max(date, latest.get(slug, date))
    return sorted(ended, key=lambda frozen: (dates[frozen.number], frozen.number))


def state_of(trial: Trial) -> tuple[Any, list[float] | None]:
    """Return what Optuna is told of a trial: its state, and its time if it passed."""
    from optuna.trial import TrialState

    return (TrialState.FAIL, None) if trial.median_ms is None else (TrialState.COMPLETE, [trial.median_ms])


def created(
    state: Any, schedule: AnySchedule, attributes: Mapping[str, Any], values: list[float] | None = None
) -> FrozenTrial:
    from optuna.trial import create_trial

    return create_trial(
        state=state,
        params=labels(schedule),
        distributions=choices(axes_of(schedule)),
        values=values,
        user_attrs={SCHEDULE: schedule.slug, **attributes},
    )


def read_journal(path: Path) -> Iterator[tuple[Any, list[Trial]]]:
    """Yield the header and the trials, as they ended, of each search in a journal, which is not written to.

    Raises ValueError, LookupError, TypeError or AssertionError if the file is not one, or not of m2gen.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(path)))
    for study in storage.get_all_studies():
        frozen = storage.get_all_trials(study._study_id, deepcopy=False)
        ended = [each for each in frozen if RESULT in each.user_attrs and each.state.is_finished()]
        yield study.user_attrs.get(SEARCH, {}), [decode_trial(each.user_attrs[RESULT]) for each in in_order(ended)]
