"""Tell which files of a folder are m2gen's: those that its manifest there lists. All others stay as they are."""

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

from m2gen.errors import PlaceError, os_errors_as

MANIFEST = "MANIFEST.json"
GIT = ".git"
"""A git repository at the top of a folder is never read, moved or removed."""
HASH = re.compile(r"[0-9a-f]{16}")
CACHE = "__pycache__"
BYTECODE = re.compile(r".+\.pyc(\.\d+)?")
"""Python's cache of a module, also while it is being written; it can be removed at any time."""
NAMED = 3
"""Number of files that a refusal names; it counts the rest."""


def hashes(files: Mapping[str, str]) -> dict[str, str]:
    """Return the hash of each file, as manifests list them."""
    return {path: hash_of(text.encode()) for path, text in files.items()}


def hash_of(data: bytes) -> str:
    """Return the hash of a file with this content, as manifests list it."""
    return hashlib.sha256(data).hexdigest()[:16]


def listed(manifest: bytes) -> frozenset[str]:
    """Return the files that a manifest lists, itself included; empty if it is not m2gen's."""
    files = listed_hashes(manifest)
    return frozenset({MANIFEST, *files}) if files else frozenset()


def listed_hashes(manifest: bytes) -> Mapping[str, str]:
    """Return the files that a manifest lists with their hashes; empty if it is not m2gen's.

    A manifest that lists a file outside its folder or in a repository is not m2gen's.
    """
    try:
        parsed = json.loads(manifest)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(parsed, dict) or not all(isinstance(parsed.get(key), str) for key in ("name", "m2gen")):
        return {}
    files = parsed.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(value, str) and HASH.fullmatch(value) for value in files.values()
    ):
        return {}
    return files if all(map(_within, files)) else {}


def _within(path: str) -> bool:
    """Return whether a path names a file that m2gen may write below a folder: it stays there, and in no repository."""
    parts = path.split("/")
    return "\0" not in path and not any(part in ("", ".", "..") or part.lower() == GIT for part in parts)


def listed_in(folder: Path) -> frozenset[str]:
    """Return the files that the manifest in ``folder`` lists; empty if there is none of m2gen's."""
    path = folder / MANIFEST
    try:
        return frozenset() if path.is_symlink() else listed(path.read_bytes())
    except OSError:
        return frozenset()


@dataclass(frozen=True)
class Tree:
    """Everything below a folder except ``.git`` and leftovers of killed builds, as relative paths with slashes."""

    files: frozenset[str]
    """Everything that is neither a folder nor bytecode; links to folders are files."""
    folders: frozenset[str]
    bytecode: frozenset[str]

    def others(self, owned: Collection[str]) -> list[str]:
        """Return the files that are not in ``owned``, and empty folders, with a slash."""
        used = {parent.as_posix() for path in {*self.files, *owned} for parent in PurePosixPath(path).parents}
        empty = (path for path in self.folders - used if PurePosixPath(path).name != CACHE)
        return sorted([*(self.files - set(owned)), *(f"{path}/" for path in empty)])


def scan(folder: Path) -> Tree:
    """Return the tree below a folder, without following links; raises OSError if a part of it cannot be read."""
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
    """Return the entries of a folder; none if it is missing, perhaps since a moment ago."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def equal(path: Path, data: bytes) -> bool:
    """Return whether a path is a regular file that holds exactly ``data``."""
    try:
        return not path.is_symlink() and path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


def same(folder: Path, contents: Mapping[str, bytes]) -> bool:
    """Return whether a folder holds exactly these files, apart from ``.git`` and bytecode."""
    return (
        folder.is_dir()
        and not scan(folder).others(contents)
        and all(equal(folder / path, data) for path, data in contents.items())
    )


def others(folder: Path, contents: Mapping[str, bytes]) -> list[str]:
    """Return the files in a folder that m2gen neither wrote nor is about to write with the same content.

    Raises OSError if a part of the folder cannot be read.
    """
    before = listed_in(folder)
    tree = scan(folder)
    owned = before | listed_in(folder)  # another build may have written its own in between
    return [path for path in tree.others(owned) if path not in contents or not equal(folder / path, contents[path])]


def refuse_others(shown: Path, place: Path, contents: Mapping[str, bytes]) -> None:
    """Raise PlaceError if ``place`` holds files of others; ``shown`` is the path as the user gave it."""
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise PlaceError(f"{shown} must be a folder, got {'a link to itself' if place.is_symlink() else 'a file'}")
    with os_errors_as(PlaceError, f"{shown} must be readable"):
        found = others(place, contents)
    if found:
        raise PlaceError(
            f"{shown} must be absent, empty or a generated package, got what m2gen did not write: {_some(found)};"
            " move that elsewhere, or build into another --out"
        )


def _some(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def remove(folder: Path, paths: Iterable[str]) -> None:
    """Remove these files, bytecode, folders that are then empty, and last the manifest, by which others are told apart.

    Whatever cannot be removed, or is not m2gen's, stays.
    """
    with contextlib.suppress(OSError):
        clean(folder)
        tree = scan(folder)
        for path in ("", *tree.folders):  # a package may be write-protected
            (folder / path).chmod((folder / path).stat().st_mode | 0o700)
        for path in [*sorted({*(tree.files & {*paths}), *tree.bytecode} - {MANIFEST}), MANIFEST]:
            (folder / path).unlink(missing_ok=True)
        prune(folder, tree.folders)
        folder.rmdir()


def prune(folder: Path, below: Iterable[str]) -> None:
    """Remove those of the folders ``below`` that are empty."""
    for path in sorted(below, reverse=True):
        with contextlib.suppress(OSError):
            (folder / path).rmdir()


def staging_name(name: str = "") -> str:
    """Return a temporary name that no other build uses, for ``name`` or for files of the folder itself."""
    return f"{f'.{name}' if name else ''}.m2gen-{secrets.token_hex(8)}"


def leftovers(folder: Path, name: str = "") -> list[Path]:
    """Return the temporary folders in ``folder`` that killed builds left, for ``name`` or itself, if all is m2gen's."""
    pattern = re.compile(re.escape(f".{name}" if name else "") + r"\.m2gen-[0-9a-f]{16}")
    found = [folder / entry.name for entry in _entries(folder) if pattern.fullmatch(entry.name)]
    owned = {MANIFEST, name} if name else {MANIFEST, *listed_in(folder)}
    return [
        path
        for path in found
        if path.is_dir() and not path.is_symlink() and scan(path).files <= {*owned, *listed_in(path)}
    ]


def clean(folder: Path, name: str = "") -> None:
    """Remove the leftovers of killed builds in ``folder``; the caller holds the lock that keeps running builds out."""
    also = {name} if name else listed_in(folder)
    for path in leftovers(folder, name):
        remove(path, {*also, *listed_in(path)})
