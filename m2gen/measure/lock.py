"""The lock of a GPU, which lets one tuner or benchmark at a time measure on it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from m2gen.errors import TuneError, os_errors_as

EVERYBODYS = 0o666
"""Mode of the file: users of one machine exclude each other, too."""
POLL_SECONDS, LOOKS = 0.02, 50
"""How often it is looked which process has the lock, which that writes into the file only once it has it."""


@contextmanager
def exclusive(gpu: str) -> Iterator[None]:
    """Hold the lock of a GPU, named by its UUID; raises TuneError if another process holds it.

    The system drops the lock with the process, however that ends.
    """
    import fcntl

    path = Path(tempfile.gettempdir()) / f"m2gen-{gpu}.lock"
    with os_errors_as(TuneError, f"{path} must be writable"):
        handle = _opened(path)
    try:
        with os_errors_as(TuneError, f"{path} must be writable"):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _owner(path)
                words = f"one tuner or benchmark at a time must use {gpu}: process {owner} does ({path})"
                raise TuneError(words) from None
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    """Return a descriptor of the file, which may be another user's from before.

    filelock refuses such a file, and Linux does where it is opened to be made if it is missing (fs.protected_regular).
    """
    with suppress(FileExistsError):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, EVERYBODYS)
        os.fchmod(handle, EVERYBODYS)  # whatever the umask is
        return handle
    return os.open(path, os.O_RDWR | os.O_NOFOLLOW)


def _owner(path: Path) -> str:
    """Return the process that holds a lock, as it wrote into the file; the last owner, if any, may still be there."""
    for _ in range(LOOKS):
        owner = path.read_text(encoding="utf-8", errors="replace")[:20].strip()
        if owner and (not owner.isdecimal() or alive(int(owner))):
            return owner
        time.sleep(POLL_SECONDS)
    return "unknown"


def alive(pid: int) -> bool:
    """Return whether a process of this host runs, be it another user's."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
