"""A sign of life of each rank: a file that says what the rank does, and that is touched for as long as it runs."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

BEAT_SECONDS = 1.0
SILENT_SECONDS = 10.0
"""A rank that has not touched its file for so long does not run: it is stopped, or its host is."""


class Pulse:
    """The sign of life of this process, a rank; a thread gives it, also while the rank waits for others."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = _file(folder, rank)
        self.at("starts")
        threading.Thread(target=self._beat, daemon=True).start()

    def at(self, doing: str) -> None:
        """Say what the rank does from now on."""
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps({"pid": os.getpid(), "doing": doing}), encoding="utf-8")
        beside.replace(self._path)

    def _beat(self) -> None:
        while self._path.parent.is_dir():
            if self._path.exists():
                os.utime(self._path)
            time.sleep(BEAT_SECONDS)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"pulse{rank}.json"


def pid_of(folder: Path, rank: int) -> int:
    """Return the process of a rank that has begun."""
    return int(json.loads(_file(folder, rank).read_text(encoding="utf-8"))["pid"])


def state_of(folder: Path, rank: int) -> str:
    """Return what a rank does, or that it does not run; empty of one that has not begun."""
    path = _file(folder, rank)
    if not path.is_file():
        return ""
    doing: str = json.loads(path.read_text(encoding="utf-8"))["doing"]
    since = time.time() - path.stat().st_mtime
    return f"does not run, after: {doing}" if since > SILENT_SECONDS else doing
