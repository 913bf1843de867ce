"""A program's progress in calls of functions rather than seconds: the same on a machine of any speed.

``count`` says how many calls something makes. ``die_at`` ends this process at one of them as SIGKILL does, wherever
that is: between a write and what makes it last, between two renames, in the middle of an import.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

CALLS = ("call", "c_call")
"""Of functions in Python, and of those in C, which is where the system is called."""


def count(run: Callable[[], object]) -> int:
    """Run something and return how many calls that took."""
    made, before = 0, sys.getprofile()

    def see(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal made
        made += event in CALLS

    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(before)
    return made


def die_at(call: int) -> None:
    """End this process at its ``call``-th call from now on."""
    left = call

    def see(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        left -= event in CALLS
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(see)
