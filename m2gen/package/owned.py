"""What of a folder is m2gen's: what its own manifest there lists. Everything else is somebody's, and stays."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from m2gen.errors import PlaceError

MANIFEST = "MANIFEST.json"
GIT = ".git"
"""A repository at the top of a folder: never read, moved or removed."""
HASH = re.compile(r"[0-9a-f]{16}")
CACHE = "__pycache__"
BYTECODE = re.compile(r".+\.pyc(\.\d+)?")
"""Python's cache of a module, also while it is being written; it can be made again at any time."""
NAMED = 3
"""Files that a refusal names before it counts the rest."""


def hashes(files: Mapping[str, str]) -> dict[str, str]:
    """Return the hash of each file, as manifests list them."""
    return {path: hashlib.sha256(text.encode()).hexdigest()[:16] for path, text in files.items()}


def listed(manifest: bytes) -> frozenset[str]:
    """Return the files that a manifest says m2gen wrote, itself among them; empty if it is none of m2gen's."""
    try:
        parsed = json.loads(manifest)
    except (ValueError, RecursionError):
        return frozenset()
    if not isinstance(parsed, dict) or not all(isinstance(parsed.get(key), str) for key in ("name", "m2gen")):
        return frozenset()
    files = parsed.get("files")
    if not isinstance(files, dict) or not files:
        return frozenset()
    if not all(isinstance(value, str) and HASH.fullmatch(value) for value in files.values()):
        return frozenset()
    return frozenset({MANIFEST, *files})


def listed_in(folder: Path) -> frozenset[str]:
    """Return the files that the manifest in ``folder`` says m2gen wrote; empty where there is none of m2gen's."""
    path = folder / MANIFEST
    try:
        return frozenset() if path.is_symlink() else listed(path.read_bytes())
    except OSError:
        return frozenset()


@dataclass(frozen=True)
class Tree:
    """Everything below a folder but its repository and what killed builds left; relative paths with slashes."""

    files: frozenset[str]
    """Whatever is no folder, links to folders among them, but for bytecode."""
    folders: frozenset[str]
    bytecode: frozenset[str]

    def others(self, owned: Collection[str]) -> list[str]:
        """Return the files that ``owned`` does not have, and with a slash the folders in which there is nothing."""
        used = {parent.as_posix() for path in {*self.files, *owned} for parent in PurePosixPath(path).parents}
        empty = (path for path in self.folders - used if PurePosixPath(path).name != CACHE)
        return sorted([*(self.files - set(owned)), *(f"{path}/" for path in empty)])


def scan(folder: Path) -> Tree:
    """Walk a folder without following links; raises OSError where a part of it cannot be read."""
    skipped = {GIT, *(path.name for path in leftovers(folder))}
    files: set[str] = set()
    folders: set[str] = set()
    bytecode: set[str] = set()
    waiting = [PurePosixPath()]
    while waiting:
        inside = waiting.pop()
        for entry in _entries(folder / inside):
            if inside == PurePosixPath() and entry.name in skipped:
                continue
            path = (inside / entry.name).as_posix()
            if entry.is_dir(follow_symlinks=False):
                folders.add(path)
                waiting.append(inside / entry.name)
            elif inside.name == CACHE and BYTECODE.fullmatch(entry.name):
                bytecode.add(path)
            else:
                files.add(path)
    return Tree(frozenset(files), frozenset(folders), frozenset(bytecode))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder, nothing where there is none, perhaps no longer."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def equal(path: Path, data: bytes) -> bool:
    """Whether a path is a plain file that holds exactly ``data``."""
    try:
        return not path.is_symlink() and path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


def same(folder: Path, contents: Mapping[str, bytes]) -> bool:
    """Whether a folder holds exactly these files, a repository and bytecode aside."""
    return (
        folder.is_dir()
        and not scan(folder).others(contents)
        and all(equal(folder / path, data) for path, data in contents.items())
    )


def others(folder: Path, contents: Mapping[str, bytes]) -> list[str]:
    """Return what lies in a folder that m2gen did not write, and that is not what it is about to write.

    Raises OSError where a part of it cannot be read.
    """
    before = listed_in(folder)
    tree = scan(folder)
    owned = before | listed_in(folder)  # another build may have put its own in between
    return [path for path in tree.others(owned) if path not in contents or not equal(folder / path, contents[path])]


def refuse_others(shown: Path, place: Path, contents: Mapping[str, bytes]) -> None:
    """Raise PlaceError where writing ``contents`` would cost somebody a file; ``shown`` is the user's word for it."""
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise PlaceError(f"{shown} must be a folder, got {'a link to itself' if place.is_symlink() else 'a file'}")
    try:
        found = others(place, contents)
    except OSError as error:
        raise PlaceError(f"{shown} must be readable: {error.strerror or error}") from error
    if found:
        raise PlaceError(
            f"{shown} must be absent, empty or a generated package, got what m2gen did not write: {_some(found)};"
            " move that elsewhere, or build into another --out"
        )


def _some(names: Sequence[str]) -> str:
    """Name the first few, and say how many more there are."""
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def remove(folder: Path, paths: Iterable[str]) -> None:
    """Remove these files, bytecode, folders that are empty then, and last the manifest, which says whose it is.

    What cannot be removed, or is somebody's, stays.
    """
    with contextlib.suppress(OSError):
        clean(folder)
        tree = scan(folder)
        for path in [*sorted({*(tree.files & {*paths}), *tree.bytecode} - {MANIFEST}), MANIFEST]:
            (folder / path).unlink(missing_ok=True)
        prune(folder, tree.folders)
        folder.rmdir()


def prune(folder: Path, below: Iterable[str]) -> None:
    """Remove those of the folders ``below`` a folder in which there is nothing."""
    for path in sorted(below, reverse=True):
        with contextlib.suppress(OSError):
            (folder / path).rmdir()


def staging_name(name: str = "") -> str:
    """Return a name that no other build uses, for what is on its way to ``name``, or into the folder that it is in."""
    return f"{f'.{name}' if name else ''}.m2gen-{secrets.token_hex(8)}"


def leftovers(folder: Path, name: str = "") -> list[Path]:
    """Return what builds left in ``folder`` on the way to ``name``, or into it: so named, and all of it m2gen's."""
    pattern = re.compile(re.escape(f".{name}" if name else "") + r"\.m2gen-[0-9a-f]{16}")
    found = [folder / entry.name for entry in _entries(folder) if pattern.fullmatch(entry.name)]
    owned = {MANIFEST, name} if name else {MANIFEST, *listed_in(folder)}
    return [
        path
        for path in found
        if path.is_dir() and not path.is_symlink() and scan(path).files <= {*owned, *listed_in(path)}
    ]


def clean(folder: Path, name: str = "") -> None:
    """Remove what killed builds left in ``folder``; the caller keeps other builds out, so that none is still at it."""
    also = {name} if name else listed_in(folder)
    for path in leftovers(folder, name):
        remove(path, {*also, *listed_in(path)})
