"""Files that are written whole or not at all, and pages with a part that a program writes: what examples share."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def store(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all; each writer does so in a folder of its own beside it, and leaves none."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        staging = Path(folder) / path.name
        write(staging)
        os.replace(staging, path)


def write_text(text: str, place: Path) -> None:
    """Write a file of text."""
    store(place, lambda path: path.write_text(text, encoding="utf-8"))


def write_json(values: dict[str, Any], place: Path) -> None:
    """Write a JSON file of one line."""
    write_text(json.dumps(values) + "\n", place)


@contextlib.contextmanager
def reachable() -> Iterator[None]:
    """End the program in one line where a file or a folder cannot be read or written, as on a disk that is full."""
    try:
        yield
    except OSError as error:
        place, said = error.filename or "files", error.strerror or error
        raise SystemExit(f"{place} must be readable and writable: {said}") from None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a folder, and end the program where another process is within this context for the same one.

    The system gives the lock back when a process ends, however it does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "of unknown number"
            raise SystemExit(
                f"{folder} must be used by one process at a time, got one that process {owner} uses"
            ) from None
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # for processes that were forked with it as well


def around(readme: Path, name: str) -> tuple[str, str]:
    """Return a page up to the mark that begins a program's part, and from the one that ends it.

    A page without these marks ends the program.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, begins, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, ends, after = rest.partition(end)
    if not begins or not ends:
        raise SystemExit(f"{readme} must have {begin} and, below it, {end}, got none")
    return before + begin, end + after
