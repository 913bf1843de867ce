"""One tuner or benchmark for each GPU of a machine: what two measure at once, neither measures."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m2gen.errors import TuneError


@contextmanager
def exclusive(gpu: str) -> Iterator[None]:
    """Hold the lock of a GPU, named by its UUID; raises TuneError where another process holds it.

    The system drops the lock with the process, however that ends.
    """
    path = Path(tempfile.gettempdir()) / f"m2gen-{gpu}.lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise TuneError(f"{path} must be writable: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(handle, 20, 0).decode(errors="replace").strip() or "unknown"
            raise TuneError(f"one tuner or benchmark at a time must use {gpu}: process {owner} does ({path})") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
