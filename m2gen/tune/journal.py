"""Every trial of a search as a line on disk, so that a killed tuner goes on where it was."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from m2gen.cache import ELSEWHERE
from m2gen.db import Failure, Reason
from m2gen.errors import ScheduleError, TuneError
from m2gen.schedule import Schedule, parse
from m2gen.tune.trial import Trial

BOOT = Path("/proc/sys/kernel/random/boot_id")


@cache
def _adapter() -> TypeAdapter[Trial]:
    return TypeAdapter(Trial)


def encode_trial(trial: Trial) -> Any:
    """Return a trial as JSON values."""
    return _adapter().dump_python(trial, mode="json")


def decode_trial(value: Any) -> Trial:
    """Return the trial that ``encode_trial`` wrote; raises ValueError for anything else."""
    return _adapter().validate_python(value)


def _machine() -> list[str]:
    """Return this host and what names its last start; a killed tuner is no candidate's fault, a dead machine may be."""
    return [platform.node(), BOOT.read_text(encoding="ascii").strip() if BOOT.exists() else ""]


class Journal:
    """A search's trials in a file of JSON lines; each is on disk before ``record`` returns.

    A torn last line, of a tuner that was killed, is cut off; any other line that is no trial raises TuneError.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, fresh: bool = False) -> None:
        """``fresh`` forgets what earlier runs found."""
        self.path = path
        self._trials: dict[Schedule, Trial] = {}
        self._begun: dict[str, list[str]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if fresh:
                path.unlink(missing_ok=True)
            self._read()
            empty = not path.exists() or not path.stat().st_size
            self._stream = open(path, "ab", buffering=0)  # noqa: SIM115  (kept open for the search)
        except OSError as error:
            raise TuneError(f"{path} must be writable: {error.strerror or error}; {ELSEWHERE}") from error
        if empty:
            self._append({"search": dict(header)})

    def trials(self) -> list[Trial]:
        """Return what earlier runs found, in order."""
        known = {schedule.slug for schedule in self._trials}
        for slug, machine in self._begun.items():
            host, boot = _machine()
            if slug not in known and machine[0] == host and machine[1] != boot:
                failure = Failure(Reason.CRASH, "the machine went down while this candidate ran")
                self.record(Trial(parse(slug), "resumed", failure=failure))
        return list(self._trials.values())

    def news(self) -> list[Trial]:
        """Return what other workers found since the last call: a journal has one worker."""
        return []

    def adopt(self) -> list[Schedule]:
        """Return candidates of workers that are gone: a journal has one worker."""
        return []

    def pending(self) -> int:
        """Return how many candidates other workers are at."""
        return 0

    def claim(self, schedule: Schedule) -> bool:
        """Return whether this worker may try a candidate."""
        return schedule not in self._trials

    def begin(self, schedule: Schedule) -> None:
        """Note that a candidate is about to run on the GPU, in case the machine does not survive it."""
        self._append({"begun": schedule.slug, "machine": _machine()})

    def record(self, trial: Trial) -> None:
        """Keep a trial; a later one of the same candidate, of the finals, replaces it."""
        self._trials[trial.schedule] = trial
        self._append({"trial": encode_trial(trial)})

    def release(self, schedule: Schedule) -> None:
        """Give up a claim: of a journal, nobody else waits for it."""

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _append(self, value: Mapping[str, Any]) -> None:
        line = json.dumps(value, sort_keys=True, allow_nan=False).encode() + b"\n"
        start = os.fstat(self._stream.fileno()).st_size
        try:
            if self._stream.write(line) != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(self._stream.fileno())
        except OSError as error:
            self._stream.truncate(start)
            reason = error.strerror or error
            raise TuneError(f"{self.path} must be writable: {reason}; trials so far are kept; {ELSEWHERE}") from error

    def _read(self) -> None:
        """Read what is there, and cut off a last line without an end."""
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
