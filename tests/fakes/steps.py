"""A program's progress in calls rather than seconds: the same on a machine of any speed.

What is on disk changes only where a program calls the system, so a kill before each of these calls is every kill there
is, but for half a write.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

SYSTEM = {"posix", "fcntl", "_io"}
"""Modules whose functions call the system, and whose types' methods do."""


def _calls(event: str, called: Any) -> bool:
    """Return whether a profiler's event is a call of a function."""
    return event in ("call", "c_call")


def _calls_the_system(event: str, called: Any) -> bool:
    """Return whether it is a call of the system, about: opening, writing, syncing, renaming."""
    module = getattr(called, "__module__", None) or type(getattr(called, "__self__", None)).__module__
    return event == "c_call" and module in SYSTEM


class Count:
    """Counts the calls within a block: of any function, or with ``system`` of system calls alone."""

    def __init__(self, *, system: bool = False) -> None:
        self.made = 0
        self._counts = _calls_the_system if system else _calls

    def _see(self, frame: FrameType, event: str, called: Any) -> None:
        self.made += self._counts(event, called)

    def __enter__(self) -> Count:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def die_at(call: int) -> None:
    """End this process as SIGKILL does, right before its ``call``-th call of the system from now on."""
    left = call

    def see(frame: FrameType, event: str, called: Any) -> None:
        nonlocal left
        left -= _calls_the_system(event, called)
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(see)
