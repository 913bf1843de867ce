"""The lock of a GPU, which lets one tuner or benchmark at a time measure on it."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m2gen.errors import TuneError, os_errors_as


@contextmanager
def exclusive(gpu: str) -> Iterator[None]:
    """Hold the lock of a GPU, named by its UUID; raises TuneError if another process holds it.

    The system drops the lock with the process, however that ends.
    """
    path = Path(tempfile.gettempdir()) / f"m2gen-{gpu}.lock"
    with os_errors_as(TuneError, f"{path} must be writable"):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
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
