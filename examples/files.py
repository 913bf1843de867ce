"""Files that are written whole or not at all, and pages with a part that a program writes: what examples share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def store(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all."""
    staging = path.with_suffix(".new")
    write(staging)
    os.replace(staging, path)


def write_json(values: dict[str, Any], place: Path) -> None:
    """Write a JSON file of one line."""
    store(place, lambda path: path.write_text(json.dumps(values) + "\n", encoding="utf-8"))


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
