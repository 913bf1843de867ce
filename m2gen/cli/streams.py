"""The standard streams of a command: some are closed, some are full, and some have a reader that has seen enough."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable

GONE = 141
"""Exit status of a command whose reader is gone: what a shell shows of a program that SIGPIPE ended."""
_OUTPUTS = (1, 2)


def open_streams() -> None:
    """Put the null device where a stream is closed, so that no file takes its number; escape what cannot be encoded."""
    for descriptor in (0, *_OUTPUTS):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (until the process ends)
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def reader_is_gone() -> bool:
    """Return whether nobody reads the other end of standard output or standard error."""
    watched = select.poll()
    for descriptor in _OUTPUTS:
        watched.register(descriptor, select.POLLOUT)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit status, with all that it printed written.

    Where the reader is gone, as that of ``m2gen info | head -1`` is, this is quiet. Where the disk is full, this is one
    line, of the command itself if it found that out.
    """
    status = 0
    try:
        status = _run(command)
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        status = GONE
    except OSError as error:
        if not status:
            print(f"m2gen: standard output must be writable: {error.strerror or error}", file=sys.stderr)
        status = status or 1
    if status:
        _drop_unwritten()
    return status


def _run(command: Callable[[], int | None]) -> int:
    try:
        return command() or 0
    except SystemExit as left:  # Typer's and Rich's way out of a broken pipe, and that of completion
        if isinstance(left.__context__, BrokenPipeError):
            return GONE
        return left.code if isinstance(left.code, int) else int(bool(left.code))


def _drop_unwritten() -> None:
    """Let what could not be written go nowhere, rather than have the interpreter fail once more as it ends."""
    for descriptor, stream in zip(_OUTPUTS, (sys.__stdout__, sys.__stderr__), strict=True):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
