"""A journal of a search: every trial is a line on disk, so that a killed tuner resumes where it was."""

from __future__ import annotations

import errno
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from m2gen.cache import ELSEWHERE
from m2gen.db import Failure, Reason
from m2gen.errors import ScheduleError, TuneError, os_errors_as
from m2gen.schedule import Schedule, parse
from m2gen.tune.trial import Trial

BOOT = Path("/proc/sys/kernel/random/boot_id")


_ADAPTER = TypeAdapter(Trial)


def encode_trial(trial: Trial) -> Any:
    """Return a trial as JSON values."""
    return _ADAPTER.dump_python(trial, mode="json")


def decode_trial(value: Any) -> Trial:
    """Return a trial from JSON values; raises ValueError if they are not one."""
    return _ADAPTER.validate_python(value)


def _machine() -> list[str]:
    """Return this host and the id of its last boot: a candidate is blamed for a reboot, but not for a killed tuner."""
    return [platform.node(), BOOT.read_text(encoding="ascii").strip() if BOOT.exists() else ""]


class Journal:
    """A search's trials in a file of JSON lines; each is on disk before ``record`` returns.

    A torn last line, left by a killed tuner, is cut off; any other line that is not a trial raises TuneError.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Open or create a journal; ``fresh`` drops the trials of earlier runs. Raises TuneError."""
        self.path = path
        self._trials: dict[Schedule, Trial] = {}
        self._begun: dict[str, list[str]] = {}
        with os_errors_as(TuneError, f"{path} must be writable", f"; {ELSEWHERE}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if fresh:
                path.unlink(missing_ok=True)
            self._read()
            empty = not path.exists() or not path.stat().st_size
            self._stream = open(path, "ab", buffering=0)  # noqa: SIM115  (kept open for the search)
        if empty:
            self._append({"search": dict(header)})

    def trials(self) -> list[Trial]:
        """Return the trials of earlier runs, in order."""
        known = {schedule.slug for schedule in self._trials}
        for slug, machine in self._begun.items():
            host, boot = _machine()
            if slug not in known and machine[0] == host and machine[1] != boot:
                failure = Failure(Reason.CRASH, "the machine went down while this candidate ran")
                self.record(Trial(parse(slug), "resumed", failure=failure))
        return list(self._trials.values())

    def news(self) -> list[Trial]:
        """Return the trials of other workers since the last call: none, since a journal has one worker."""
        return []

    def adopt(self) -> list[Schedule]:
        """Return abandoned candidates of other workers: none, since a journal has one worker."""
        return []

    def pending(self) -> int:
        """Return the number of candidates that other workers hold: none, since a journal has one worker."""
        return 0

    def claim(self, schedule: Schedule) -> bool:
        """Return whether this worker may try a candidate."""
        return schedule not in self._trials

    def begin(self, schedule: Schedule) -> None:
        """Note that a candidate is about to run on the GPU, in case the machine goes down."""
        self._append({"begun": schedule.slug, "machine": _machine()})

    def record(self, trial: Trial) -> None:
        """Write a trial; a later one of the same candidate, from the final, replaces it."""
        self._trials[trial.schedule] = trial
        self._append({"trial": encode_trial(trial)})

    def release(self, schedule: Schedule) -> None:
        """Give up a claim, which does nothing here, since a journal has one worker."""

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _append(self, value: Mapping[str, Any]) -> None:
        line = json.dumps(value, sort_keys=True, allow_nan=False).encode() + b"\n"
        start = os.fstat(self._stream.fileno()).st_size
        advice = f"; trials so far are kept; {ELSEWHERE}"
        try:
            with os_errors_as(TuneError, f"{self.path} must be writable", advice):
                if self._stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._stream.fileno())
        except TuneError:
            self._stream.truncate(start)
            raise

    def _read(self) -> None:
        """Read the file, and cut off a last line without an end."""
        if not self.path.exists():
            return
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._learn(json.loads(line))
            except (ValueError, LookupError, TypeError, RecursionError, ScheduleError) as error:
                where = f"{self.path}:{number}"
                raise TuneError(
                    f"{where} must be a line of m2gen tune, got {line[:40]!r}; --fresh starts anew"
                ) from error
        if len(whole) != len(text):
            with open(self.path, "r+b") as stream:
                stream.truncate(len(whole))

    def _learn(self, value: Mapping[str, Any]) -> None:
        if not isinstance(value, dict):
            raise TypeError("no JSON object")
        if "begun" in value:
            host, boot = value["machine"]
            self._begun[parse(str(value["begun"])).slug] = [str(host), str(boot)]
        elif "trial" in value:
            trial = decode_trial(value["trial"])
            self._trials[trial.schedule] = trial
        elif "search" not in value:
            raise ValueError("neither search, begun nor trial")
