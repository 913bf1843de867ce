"""Where searches are kept: Optuna's storages, a journal in a file or a database that several hosts share."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sql
from filelock import FileLock
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from m2gen.cache import ELSEWHERE
from m2gen.errors import TuneError, UsageError, os_errors_as
from m2gen.tune.study import RESULT

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

HEARTBEAT_SECONDS, GRACE_SECONDS = 5, 120
"""How often workers say through a database that they live, and the silence, longer than any step on the GPU, after
which their candidates are others'."""
RACES = 10
"""Attempts to create tables or the study while other workers create them as well."""
RACED = ("already exists", "database is locked")
"""What SQLite says then, by the error that it also has for a file that cannot be opened."""
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError)
"""What Optuna raises for lines that it did not write."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class SearchStorage:
    """One of Optuna's storages."""

    storage: BaseStorage
    shown: str
    """Its name in errors: a path, or an option with a URL without the password."""
    advice: str
    """End of the errors about writing."""
    beat: Callable[[int], None]
    """Says that the worker of a trial lives."""
    fail_stale: Callable[[Study], None]
    """Fails the trials whose workers have been silent, and has others try them."""
    close: Callable[[], None]

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise TuneError if the storage cannot be used."""
        from optuna.exceptions import StorageInternalError

        try:
            with os_errors_as(TuneError, f"{self.shown} must be writable", self.advice):
                yield
        except (SQLAlchemyError, StorageInternalError) as error:
            raise _unusable(self.shown, error) from error
        except KeyError as error:  # Optuna's for a study that is gone
            raise TuneError(f"{self.shown} must keep the search while it goes on: another tuner began anew") from error


def retry(study: Study, failed: FrozenTrial) -> None:
    """Have the candidate of an abandoned trial tried again, unless its worker got as far as the result."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    if RESULT not in failed.user_attrs:
        with _quiet():
            RetryHeartbeatStaleTrialCallback()(study, failed)


def open_journal(path: Path, *, fresh: bool = False) -> SearchStorage:
    """Open or create a journal; ``fresh`` replaces one that cannot be read. Raises TuneError."""
    with os_errors_as(TuneError, f"{path} must be writable", f"; {ELSEWHERE}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage = _journal(path)
        except TuneError:
            if not fresh:
                raise
            path.unlink()
            storage = _journal(path)
    nothing: Callable[[Any], None] = lambda _: None  # noqa: E731
    return SearchStorage(storage, str(path), f"; trials so far are kept; {ELSEWHERE}", nothing, nothing, lambda: None)


def _journal(path: Path) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path.touch()
    lock: Any = _JournalLock(path)
    lock.acquire()
    lock.release()
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            int(json.loads(line)["op_code"])
        except UNREADABLE as error:
            raise _no_journal(f"{path}:{number}", "a line of Optuna's journal", repr(line[:40])) from error
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except UNREADABLE as error:
        raise _no_journal(str(path), "a journal of Optuna's", f"{type(error).__name__}: {error}") from error


def _no_journal(where: str, what: str, got: str) -> TuneError:
    return TuneError(f"{where} must be {what}, got {got}; --fresh starts anew")


class _JournalLock:
    """Optuna's lock of a journal: gone with its process, and no part of a line is there when it is taken or left.

    Optuna's own locks are files (of the journal's name and ``.lock``), for whose removal others wait half a minute
    after a kill, and its backend appends to whatever a kill or a full disk left.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, FileLock(f"{path}.flock")

    def acquire(self) -> bool:
        self._lock.acquire()
        self._cut()
        return True

    def release(self) -> None:
        try:
            self._cut()
        finally:
            self._lock.release()

    def _cut(self) -> None:
        """Cut off a last line without an end."""
        with open(self._path, "r+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 1))
            if size and stream.read() != b"\n":
                stream.seek(0)
                stream.truncate(stream.read().rfind(b"\n") + 1)


def open_database(url: str) -> SearchStorage:
    """Open a database, and create its tables; raises UsageError for a bad URL, TuneError if it cannot be used."""
    try:
        parsed = sql.make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        sql.create_engine(parsed).dispose()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise UsageError(f"--storage must be a database URL such as postgresql://host/name ({error})") from error
    except ModuleNotFoundError as error:
        raise UsageError(f"--storage {parsed.drivername} must have its driver installed: {error.name}") from error
    shown = f"--storage {parsed.render_as_string(hide_password=True)}"
    from optuna.exceptions import StorageInternalError

    try:
        storage = raced(lambda: _database(parsed.render_as_string(hide_password=False)))
    except (SQLAlchemyError, StorageInternalError) as error:
        raise _unusable(shown, error) from error
    return SearchStorage(storage, shown, "", storage.record_heartbeat, _fail_stale, storage.engine.dispose)


def _database(url: str) -> Any:
    from optuna.storages import RDBStorage

    with _quiet():
        return RDBStorage(
            url,
            engine_kwargs={"pool_pre_ping": True},
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
            heartbeat_stale_trial_callback=retry,
        )


def _fail_stale(study: Study) -> None:
    from optuna.storages import fail_stale_trials

    with _quiet():
        fail_stale_trials(study)


def _unusable(shown: str, error: Exception) -> TuneError:
    reason = str(error.__cause__ or error).strip().splitlines()[0]
    return TuneError(f"{shown} must be a database that can be written: {reason}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's remarks about experimental functions, of which its heartbeats are, from users."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def raced(make: Callable[[], Made]) -> Made:
    """Return the result of ``make``, trying again if another worker makes the same tables or study."""
    from optuna.exceptions import StorageInternalError

    for attempt in range(RACES):
        try:
            return make()
        except (SQLAlchemyError, StorageInternalError) as error:
            if not _by_another(error.__cause__ if isinstance(error, StorageInternalError) else error):
                raise
        time.sleep(0.1 * (attempt + 1))
    return make()


def _by_another(error: BaseException | None) -> bool:
    """Return whether an error may be due to what another worker makes at the same time."""
    if isinstance(error, OperationalError):
        return any(text in str(error) for text in RACED)
    return isinstance(error, (IntegrityError, ProgrammingError))
