"""Files that the user names for a command's results: checked before the work, and written in one step after it."""

from __future__ import annotations

from pathlib import Path

from m2gen.errors import M2genError, UsageError, os_errors_as


def check_output(option: str, path: Path | None) -> None:
    """Raise UsageError if the file of an option cannot be written, and change nothing; None is no file."""
    from m2gen.db.exchange import check_whole

    if path is not None:
        with os_errors_as(UsageError, f"{option} {path} must be writable"):
            check_whole(path)


def write_output(option: str, path: Path, text: str, kind: type[M2genError] = UsageError, advice: str = "") -> None:
    """Write the file of an option whole or not at all; raises a ``kind`` if it cannot be written."""
    from m2gen.db.exchange import write_whole

    with os_errors_as(kind, f"{option} {path} must be writable", advice):
        write_whole(path, text.encode())
