"""A package's files on disk: compared with what they should be, and put in place in one step."""

from __future__ import annotations

import ctypes
import difflib
import json
import os
import shutil
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from m2gen.errors import EmitError

MANIFEST = "MANIFEST.json"


class Format(StrEnum):
    """What a build makes of a package: folders but for the wheel."""

    PACKAGE = "package"
    WHEEL = "wheel"
    HF_KERNEL = "hf-kernel"

    @property
    def folder(self) -> Path:
        """Where builds put it unless they are told otherwise."""
        return Path("generated" if self is Format.PACKAGE else "dist")


def diff(directory: Path, expected: Mapping[str, str]) -> list[str]:
    """Return a unified diff from the files on disk to ``expected``, the manifest's resources aside."""
    found = {
        str(path.relative_to(directory)): path.read_text(encoding="utf-8", errors="replace")
        for path in (directory.rglob("*") if directory.is_dir() else ())
        if path.is_file() and "__pycache__" not in path.parts
    }
    lines: list[str] = []
    for path in sorted({*expected, *found}):
        old, new = (_without_resources(path, files.get(path, "")) for files in (found, expected))
        place = f"{directory.name}/{path}"
        lines += difflib.unified_diff(
            old.splitlines(), new.splitlines(), f"committed/{place}", f"rendered/{place}", lineterm=""
        )
    return lines


def _without_resources(path: str, text: str) -> str:
    if path != MANIFEST:
        return text
    try:
        parsed = json.loads(text)
        del parsed["resources"]
    except (ValueError, KeyError, TypeError):
        return text
    return json.dumps(parsed, indent=2)


def write(directory: Path, files: Mapping[str, str], mark: str = MANIFEST) -> None:
    """Make ``directory`` hold exactly ``files``: whoever looks, even after a kill, finds the old ones or the new.

    ``mark`` is a file that only a folder of this kind has; no other is replaced.

    Raises EmitError where the directory holds something else than a generated package, or cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise EmitError(f"{directory} must be a folder, got a file")
    if directory.exists() and any(directory.iterdir()) and not (directory / mark).is_file():
        raise EmitError(f"{directory} must be absent, empty or a generated package, got a folder without {mark}")
    staging = directory.parent / f".{directory.name}.new"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        for path, text in files.items():
            target = staging / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
        _swap(staging, directory)
    except OSError as error:
        raise EmitError(f"{directory} must be writable: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap(staging: Path, directory: Path) -> None:
    """Put ``staging`` in the place of ``directory``, atomically where the system can exchange two names."""
    if not directory.exists():
        os.rename(staging, directory)
        return
    exchange, at_cwd = 2, -100  # RENAME_EXCHANGE, AT_FDCWD of Linux's renameat2(2)
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and not renameat2(at_cwd, os.fsencode(staging), at_cwd, os.fsencode(directory), exchange):
        return
    retired = directory.parent / f".{directory.name}.old"
    shutil.rmtree(retired, ignore_errors=True)
    os.rename(directory, retired)
    os.rename(staging, directory)
    shutil.rmtree(retired, ignore_errors=True)
