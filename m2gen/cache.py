"""The user's cache of results that are a pure function of their key: safe to delete at any time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Hashable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from platformdirs import user_cache_path
from pydantic import TypeAdapter

from m2gen.errors import CacheError, os_errors_as

Value = TypeVar("Value")

ELSEWHERE = "M2GEN_CACHE_DIR may name another folder"
"""Advice that ends every error about the cache."""
_DISK_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENOTDIR", "EISDIR", "ENAMETOOLONG")
}


def cache_dir() -> Path:
    """Return ``$M2GEN_CACHE_DIR``, else ``m2gen`` where the system keeps caches: ``~/.cache/m2gen`` on Linux.

    If that cannot be written, or the user has no home, return a folder among the temporary files that only this user
    can write, since generated modules are imported from it. Raises CacheError if there is no such folder either.
    """
    explicit = os.environ.get("M2GEN_CACHE_DIR")
    if explicit:
        return Path(explicit).absolute()  # processes that are started in other folders get it, too
    usual = _usual()
    return _temporary() if usual is None else usual


def shortcoming() -> str:
    """Return what the cache lacks, or an empty string."""
    if not _writable(cache_dir()):
        return f"cache that can be written ({ELSEWHERE})"
    if os.environ.get("M2GEN_CACHE_DIR") or _usual() is not None:
        return ""
    return f"home that can be written (the cache is among temporary files; {ELSEWHERE})"


def _usual() -> Path | None:
    """Return the cache in the user's home, or None if that cannot be written."""
    try:
        folder = user_cache_path("m2gen", appauthor=False)
    except RuntimeError:  # there is no home
        return None
    return folder if folder.is_absolute() and _writable(folder) else None


def _home() -> Path | None:
    """Return the user's home directory, or None if neither ``HOME`` nor the system names one."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() else None


def _writable(folder: Path) -> bool:
    """Return whether a folder can be written or created."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)


def _temporary() -> Path:
    with os_errors_as(CacheError, "the cache must have a folder that can be written", f"; {ELSEWHERE}"):
        folder = Path(tempfile.gettempdir()) / f"m2gen-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise CacheError(f"{folder} must be a folder that only this user can write; {ELSEWHERE}")
    return folder


def provide_for_triton() -> None:
    """Point Triton's cache of compiled kernels into this one if its own, in the user's home, cannot be written."""
    if os.environ.get("TRITON_CACHE_DIR") or os.environ.get("TRITON_HOME"):
        return
    home = _home()
    if home is None or not _writable(home / ".triton" / "cache"):
        with contextlib.suppress(CacheError):  # raised again by whatever needs the cache
            os.environ["TRITON_CACHE_DIR"] = str(cache_dir() / "triton")


def is_of_a_disk(error: BaseException) -> bool:
    """Return whether an error means that a file could not be written, and says nothing about what was computed."""
    return isinstance(error, CacheError) or (isinstance(error, OSError) and error.errno in _DISK_ERRORS)


def key_of(*parts: str) -> str:
    """Return 24 hex digits of a hash of the given texts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:24]


def _write_atomically(path: Path, data: bytes) -> None:
    """Write a file in one step: readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def load_result(kind: str, key: str, shape: type[Value]) -> Value | None:
    """Return the cached value of type ``shape``, or None if the entry is not what ``store_result`` would write."""
    adapter = _adapter(cast("Hashable", shape))
    try:
        data = (cache_dir() / kind / f"{key}.json").read_bytes()
        value: Value = adapter.validate_json(data, strict=True)
    except (OSError, ValueError, CacheError):
        return None
    return value if adapter.dump_json(value) == data else None


def store_result(kind: str, key: str, value: object) -> None:
    """Cache a dataclass instance. A cache that cannot be written is no error, only slower."""
    data = _adapter(cast("Hashable", type(value))).dump_json(value)
    with contextlib.suppress(OSError, CacheError):
        _write_atomically(cache_dir() / kind / f"{key}.json", data)


def materialise(kind: str, files: Mapping[str, str]) -> Path:
    """Return a folder, named by a hash of ``files``, that holds them; raises CacheError if it cannot be written."""
    key = key_of(*(part for item in sorted(files.items()) for part in item))
    folder = cache_dir() / kind / key
    with os_errors_as(CacheError, f"{folder} must be writable", f"; {ELSEWHERE}"):
        for path, text in files.items():
            target, data = folder / path, text.encode()
            if not target.is_file() or target.read_bytes() != data:
                _write_atomically(target, data)
    return folder
