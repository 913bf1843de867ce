"""The user's cache of results that are a pure function of their key: safe to delete at any time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Return ``$M2GEN_CACHE_DIR``, else ``m2gen`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    explicit = os.environ.get("M2GEN_CACHE_DIR")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m2gen"


def key_of(*parts: str) -> str:
    """Return 24 hex digits that name the given texts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:24]


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def load_result(kind: str, key: str) -> Any | None:
    """Return a cached JSON value, or None where there is none that can be read."""
    try:
        return json.loads((cache_dir() / kind / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def store_result(kind: str, key: str, value: Any) -> None:
    """Keep a JSON value; a cache that cannot be written is no error, only slower."""
    with contextlib.suppress(OSError):
        write_atomically(cache_dir() / kind / f"{key}.json", json.dumps(value))


def materialise(kind: str, files: Mapping[str, str]) -> Path:
    """Return a folder that holds exactly the given texts, named by them."""
    key = key_of(*(part for item in sorted(files.items()) for part in item))
    folder = cache_dir() / kind / key
    for path, text in files.items():
        target = folder / path
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            write_atomically(target, text)
    return folder
