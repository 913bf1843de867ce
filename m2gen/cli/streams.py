"""Handle standard streams that are closed, full, or whose reader is gone."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable

GONE = 141
"""Exit status if the reader of the output is gone: that of a program which SIGPIPE ended."""
_OUTPUTS = (1, 2)


def open_streams() -> None:
    """Replace closed streams by the null device, so that no file takes their numbers; escape unencodable characters.

    A width of no columns, which would leave out all text, is as if none were set.
    """
    if not os.environ.get("COLUMNS", "").strip("0"):
        os.environ.pop("COLUMNS", None)
    for descriptor in (0, *_OUTPUTS):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (until the process ends)
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def reader_is_gone() -> bool:
    """Return whether standard output or standard error is a pipe without a reader."""
    watched = select.poll()
    for descriptor in _OUTPUTS:
        watched.register(descriptor, select.POLLOUT)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command, flush its output, and return its exit status.

    This is quiet if the reader is gone, as in ``m2gen info | head -1``, and prints one line if the disk is full, unless
    the command already did.
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
    except SystemExit as left:  # raised by Typer and Rich for a broken pipe, and by completion
        if isinstance(left.__context__, BrokenPipeError):
            return GONE
        return left.code if isinstance(left.code, int) else int(bool(left.code))


def _drop_unwritten() -> None:
    """Discard unwritten output, so that the interpreter does not fail again as it ends."""
    for descriptor, stream in zip(_OUTPUTS, (sys.__stdout__, sys.__stderr__), strict=True):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
