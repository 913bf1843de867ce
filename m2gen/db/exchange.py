"""Export and import all records as one file of lines, which is written whole and checked whole."""

from __future__ import annotations

import os
from collections.abc import Iterable
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
        os.replace(files.stage(path, export_text(records).encode()), path)


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
    """Return the records of another database or of an export; raises DatabaseError unless all can be read."""
    if not path.is_dir():
        return read_export(path)
    content = Database(path).contents()
    if content.faults:
        raise DatabaseError("\n".join(map(str, content.faults)))
    return content.records
