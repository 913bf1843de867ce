"""Share a search among workers on several GPUs or hosts, by trials in Optuna's database storage.

Optuna's tables hold the finished trials, with one study for each search. A claim is a row in another table whose
primary key is the candidate, so that the database refuses a second claim; workers renew their claims, and take over
expired ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sql
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, ProgrammingError, SQLAlchemyError

from m2gen.errors import TuneError, UsageError
from m2gen.schedule import Schedule, parse
from m2gen.tune.coordinates import distributions, indices
from m2gen.tune.journal import decode_trial, encode_trial
from m2gen.tune.trial import Trial

ATTRIBUTE = "m2gen"
RACES = 10
"""Attempts to create tables or the study while other workers create them as well."""

Made = TypeVar("Made")

_TABLES = sql.MetaData()
_CLAIMS = sql.Table(
    "m2gen_claims",
    _TABLES,
    sql.Column("study", sql.String(64), primary_key=True),
    sql.Column("candidate", sql.String(64), primary_key=True),
    sql.Column("worker", sql.String(200), nullable=False),
    sql.Column("seen", sql.DateTime(timezone=True), nullable=False),
    sql.Column("done", sql.Boolean, nullable=False),
)


@dataclass(frozen=True)
class Pace:
    """Seconds between the regular actions of a worker."""

    grace: float = 120.0
    """Age at which a claim expires, by the database's clock; longer than any step on the GPU."""
    renew: float = 5.0
    poll: float = 1.0
    now: Callable[[], float] = time.monotonic


USUAL = Pace()


def open_study(url: str, name: str, worker: str, *, fresh: bool = False, pace: Pace = USUAL) -> SharedStudy:
    """Join or create a study; raises UsageError for a bad URL, and TuneError if the database cannot be used."""
    try:
        parsed = sql.make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        engine = sql.create_engine(parsed, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise UsageError(f"--storage must be a database URL such as postgresql://host/name ({error})") from error
    except ModuleNotFoundError as error:
        raise UsageError(f"--storage {parsed.drivername} must have its driver installed: {error.name}") from error
    return SharedStudy(engine, parsed, name, worker, fresh=fresh, pace=pace)


class SharedStudy:
    """A ledger in a database, which several workers share."""

    def __init__(self, engine: sql.Engine, url: sql.URL, name: str, worker: str, *, fresh: bool, pace: Pace) -> None:
        import optuna

        self._engine, self._name, self._worker, self._pace = engine, name, worker, pace
        self._shown = url.render_as_string(hide_password=True)
        self._known: set[int] = set()
        self._recorded: set[Schedule] = set()
        self._polled = self._renewed = -math.inf
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with self._errors():
            storage = _raced(lambda: optuna.storages.RDBStorage(url.render_as_string(hide_password=False)))
            _raced(lambda: _TABLES.create_all(engine))
            if fresh:
                self._forget(storage)
            self._study = _raced(lambda: optuna.create_study(storage=storage, study_name=name, load_if_exists=True))

    def trials(self) -> list[Trial]:
        """Return the trials of all workers so far."""
        return self._unseen()

    def news(self) -> list[Trial]:
        """Return the trials of other workers since the last call, and renew this worker's claims."""
        now = self._pace.now()
        if now - self._renewed > self._pace.renew:
            self._renewed = now
            self._update(self._mine, seen=sql.func.now())
        if now - self._polled < self._pace.poll:
            return []
        self._polled = now
        return self._unseen()

    def claim(self, schedule: Schedule) -> bool:
        """Claim a candidate; return False if another worker has it."""
        row = {"study": self._name, "candidate": schedule.slug, "worker": self._worker, "done": False}
        with self._errors():
            try:
                with self._engine.begin() as connection:
                    connection.execute(_CLAIMS.insert().values(**row, seen=sql.func.now()))
            except IntegrityError:
                return False
        return True

    def adopt(self) -> list[Schedule]:
        """Take over expired claims, and return those whose trials are still missing."""
        with self._errors(), self._engine.begin() as connection:
            open_ = sql.and_(_CLAIMS.c.study == self._name, ~_CLAIMS.c.done, _CLAIMS.c.worker != self._worker)
            rows = connection.execute(sql.select(_CLAIMS.c.candidate, _CLAIMS.c.worker, _AGE).where(open_)).all()
        stale = [(candidate, worker) for candidate, worker, age in rows if float(age) > self._pace.grace]
        taken = [parse(candidate) for candidate, worker in stale if self._take(candidate, worker)]
        finished = {trial.schedule for _, trial in self._numbered()} if taken else set()
        for schedule in finished.intersection(taken):
            self._update(_CLAIMS.c.candidate == schedule.slug, done=True)
        return [schedule for schedule in taken if schedule not in finished]

    def pending(self) -> int:
        """Return the number of candidates that other workers hold."""
        others = sql.and_(_CLAIMS.c.study == self._name, ~_CLAIMS.c.done, _CLAIMS.c.worker != self._worker)
        with self._errors(), self._engine.begin() as connection:
            return int(connection.execute(sql.select(sql.func.count()).where(others)).scalar_one())

    def begin(self, schedule: Schedule) -> None:
        """Renew the claim of a candidate that is about to run."""
        self._update(_CLAIMS.c.candidate == schedule.slug, seen=sql.func.now())

    def release(self, schedule: Schedule) -> None:
        """Give up a claim, so that any worker may take it."""
        mine = sql.and_(self._mine, _CLAIMS.c.candidate == schedule.slug)
        with self._errors(), self._engine.begin() as connection:
            connection.execute(_CLAIMS.delete().where(mine))

    def record(self, trial: Trial) -> None:
        """Write a trial to the study, and mark its claim as done."""
        from optuna.trial import TrialState, create_trial

        self._recorded.add(trial.schedule)
        value = trial.median_ms
        frozen = create_trial(
            state=TrialState.FAIL if value is None else TrialState.COMPLETE,
            params=indices(trial.schedule),
            distributions=distributions(),
            value=value,
            user_attrs={ATTRIBUTE: encode_trial(trial), "schedule": trial.schedule.slug, "worker": trial.worker},
        )
        with self._errors():
            self._study.add_trial(frozen)
        self._update(_CLAIMS.c.candidate == trial.schedule.slug, done=True, seen=sql.func.now())

    def close(self) -> None:
        """Drop the connections."""
        self._engine.dispose()

    @property
    def _mine(self) -> sql.ColumnElement[bool]:
        return sql.and_(_CLAIMS.c.study == self._name, _CLAIMS.c.worker == self._worker, ~_CLAIMS.c.done)

    def _take(self, candidate: str, worker: str) -> bool:
        """Take over an expired claim; return False if its worker renewed it, or another was quicker."""
        held = sql.and_(
            _CLAIMS.c.study == self._name,
            _CLAIMS.c.candidate == candidate,
            _CLAIMS.c.worker == worker,
            ~_CLAIMS.c.done,
            self._pace.grace < _AGE,
        )
        with self._errors(), self._engine.begin() as connection:
            done = connection.execute(_CLAIMS.update().where(held).values(worker=self._worker, seen=sql.func.now()))
            return bool(done.rowcount == 1)

    def _update(self, where: sql.ColumnElement[bool], **values: Any) -> None:
        with self._errors(), self._engine.begin() as connection:
            connection.execute(_CLAIMS.update().where(sql.and_(_CLAIMS.c.study == self._name, where)).values(**values))

    def _unseen(self) -> list[Trial]:
        """Return the trials that are new and that this worker did not record."""
        found = {number: trial for number, trial in self._numbered() if number not in self._known}
        self._known.update(found)
        return [trial for trial in found.values() if trial.schedule not in self._recorded]

    def _numbered(self) -> Iterator[tuple[int, Trial]]:
        with self._errors():
            for frozen in self._study.get_trials(deepcopy=False):
                if ATTRIBUTE in frozen.user_attrs:
                    yield frozen.number, self._decoded(frozen.number, frozen.user_attrs[ATTRIBUTE])

    def _decoded(self, number: int, value: Any) -> Trial:
        try:
            return decode_trial(value)
        except ValueError as error:
            where = f"--storage {self._shown}: trial {number} of study {self._name}"
            raise TuneError(f"{where} must be one that this m2gen reads; --fresh starts anew") from error

    def _forget(self, storage: Any) -> None:
        import optuna

        with self._engine.begin() as connection:
            connection.execute(_CLAIMS.delete().where(_CLAIMS.c.study == self._name))
        if self._name in [study.study_name for study in optuna.get_all_study_summaries(storage)]:
            optuna.delete_study(study_name=self._name, storage=storage)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from optuna.exceptions import StorageInternalError

        try:
            yield
        except (SQLAlchemyError, StorageInternalError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise TuneError(f"--storage {self._shown} must be a database that can be written: {reason}") from error


_AGE = sql.extract("epoch", sql.func.now()) - sql.extract("epoch", _CLAIMS.c.seen)
"""Seconds since a claim was renewed, by the database's clock."""


def _raced(make: Callable[[], Made]) -> Made:
    """Return the result of ``make``, trying again if another worker makes the same tables or study."""
    for attempt in range(RACES):
        try:
            return make()
        except (IntegrityError, ProgrammingError):
            if attempt == RACES - 1:
                raise
            time.sleep(0.1 * (attempt + 1))
    raise AssertionError("unreachable")
