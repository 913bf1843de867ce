"""Export and import all records as one file of lines, which is written whole and checked whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from m2gen.db import files
from m2gen.db.database import Database
from m2gen.db.record import Record
from m2gen.errors import DatabaseError, os_errors_as

MOST_BYTES = 64 * 2**20
"""Maximum size of an imported file: some thirty thousand records."""


def export_text(records: Iterable[Record]) -> str:
    """Return the lines of all records, in order of files."""
    ordered = sorted(set(records), key=lambda record: (str(files.place(record)), files.order(record)))
    return "".join(files.text_of([record]) for record in ordered)


def write_export(path: Path, records: Iterable[Record]) -> None:
    """Write an export in one step; raises DatabaseError if ``path`` cannot be written."""
    with os_errors_as(DatabaseError, f"{path} must be writable"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, export_text(records).encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that the user named, whole or not at all; raises OSError if that fails.

    A link is followed, a file keeps its mode, and what is no file, such as a pipe, is written to as it is.
    """
    if is_stream(path):
        path.write_bytes(data)
        return
    real = _place(path)
    staged = files.stage(real, data)
    try:
        if real.exists():
            os.chmod(staged, real.stat().st_mode & 0o7777)
        os.replace(staged, real)
    except BaseException:
        with suppress(OSError):
            os.unlink(staged)
        raise


def check_whole(path: Path) -> None:
    """Raise the errors of ``write_whole`` that can be found without writing, before work whose results go there."""
    if not is_stream(path):
        os.unlink(files.stage(_place(path), b""))


def is_stream(path: Path) -> bool:
    """Return whether a path is of a device, a pipe, or a descriptor, which has to be written to as it is."""
    by_the_system = path.absolute().parts[1:2] in (("dev",), ("proc",))
    return path.exists() and not path.is_dir() and (by_the_system or not path.is_file())


def _place(path: Path) -> Path:
    """Return where a path's links lead; raises OSError for a folder, a protected file, or a folder that is missing."""
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if real.exists() and not os.access(real, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if not real.parent.is_dir():
        reason = errno.ENOTDIR if real.parent.exists() else errno.ENOENT
        raise OSError(reason, os.strerror(reason))
    return real


def read_export(path: Path) -> tuple[Record, ...]:
    """Return the records of an untrusted file; raises DatabaseError, with lines, unless every line is a record."""
    data = _limited(path)
    content = files.parse(data, path)
    problems = [str(fault) for fault in content.faults]
    lines = [line for line in data.split(b"\n") if line.strip()]
    if len(lines) != len(content.records) + len(content.faults):
        problems.append(f"{path}: each record must be there once, got {len(lines)} lines that repeat some")
    if not lines:
        problems.append(f"{path}: must hold at least one record, got none")
    if problems:
        raise DatabaseError("\n".join(problems))
    return content.records


def _limited(path: Path) -> bytes:
    with os_errors_as(DatabaseError, f"{path} must be readable"), open(path, "rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise DatabaseError(f"{path} must take at most {MOST_BYTES} bytes, got more")
    return data


def read_other(path: Path) -> tuple[Record, ...]:
    """Return the records of another database or of an export; raises DatabaseError unless all can be read.

    A folder without records is none: whoever names one means another.
    """
    if not path.is_dir():
        return read_export(path)
    content = Database(path).contents()
    if content.faults:
        raise DatabaseError("\n".join(map(str, content.faults)))
    if not content.records:
        raise DatabaseError(f"{path} must be a database with at least one record, got none")
    return content.records
