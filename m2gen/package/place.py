"""Places that builds write to: checked, kept to one build at a time, and exchanged in one step."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m2gen.errors import PlaceError


def check_folder(out: Path) -> None:
    """Raise PlaceError where a folder to build into is something else, or a link to nothing; it may be absent."""
    if os.path.lexists(out) and not out.is_dir():
        what = "a file" if out.exists() else f"a link to {resolved(out)}, which does not exist"
        raise PlaceError(f"--out {out} must be writable as a folder, got {what}")


def resolved(path: Path) -> Path:
    """Return where a path leads, links followed, whether or not anything is there."""
    return Path(os.path.realpath(path))


@contextmanager
def unwritable(shown: Path) -> Iterator[None]:
    """Turn what the system refuses into one line that names the place."""
    try:
        yield
    except OSError as error:
        raise PlaceError(f"{shown} must be writable: {error.strerror or error}") from error


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Wait until no other build writes in ``folder``, and keep others out; yield whether that can be done.

    The lock is on the folder itself: no file is left behind, a folder that cannot be written has it as well, and the
    system drops it with its process. NFS has none on folders; builds go on without it there.
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
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def write_file(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one system call; False where the system or the file system has none."""
    exchange, at_cwd = 2, -100  # RENAME_EXCHANGE, AT_FDCWD of Linux's renameat2(2)
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return not int(renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange))
