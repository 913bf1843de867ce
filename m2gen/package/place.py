"""Output paths: checked, locked for one build at a time, and exchanged in one step."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor

from m2gen.errors import PlaceError


def check_folder(out: Path) -> None:
    """Raise PlaceError if ``out`` is a file or a dangling link; it may be absent."""
    if os.path.lexists(out) and not out.is_dir():
        what = "a file" if out.exists() else f"a link to {resolved(out)}, which does not exist"
        raise PlaceError(f"--out {out} must be writable as a folder, got {what}")


def check_new(shown: Path, real: Path) -> None:
    """Raise PlaceError if ``real``, a path without links, is absent and cannot be made."""
    there = next(path for path in real.parents if os.path.lexists(path))
    if os.path.lexists(real) or (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return
    reason = os.strerror(errno.EACCES if there.is_dir() else errno.ENOTDIR)
    raise PlaceError(f"{shown} must be writable: {reason}, {there}")


def resolved(path: Path) -> Path:
    """Return a path with its links followed, whether or not it exists."""
    return Path(os.path.realpath(path))


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of ``folder``, waiting for other builds; yield whether there is such a lock.

    The lock is on the folder itself: it leaves no file behind, works for folders that cannot be written, and the
    system drops it with its process. NFS has no locks on folders; builds go on without one there.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        yield _flocked(handle)
    finally:
        os.close(handle)


def _flocked(handle: int) -> bool:
    try:
        return lock_descriptor(handle)
    except OSError:
        return False


def write_file(path: Path, data: bytes) -> None:
    """Write a file and sync it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one system call; return False if the system or the file system cannot."""
    exchange, at_cwd = 2, -100  # RENAME_EXCHANGE, AT_FDCWD of Linux's renameat2(2)
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return not int(renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange))
