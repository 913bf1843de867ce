"""Compare a package's files on disk with the rendered ones, and replace them so that no reader finds a part."""

from __future__ import annotations

import difflib
import json
import os
import time
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path, PurePosixPath

from m2gen.errors import PlaceError, os_errors_as
from m2gen.package import owned
from m2gen.package.owned import MANIFEST
from m2gen.package.place import check_folder, check_new, exchanged, locked, resolved, write_file

__all__ = ["MANIFEST", "Format", "check_place", "diff", "write"]

ATTEMPTS = 3
"""Times that files are written again after another build wrote to them, where no lock keeps it out."""
COMPILED = "compiled/"
"""Where a package has the compiled kernels that it brings along."""
GRACE = 0.25
"""Seconds between an exchange and the removal of the old files: an import that was listing them finds them all."""
SHOWN = 64 * 1024
"""Maximum bytes of a file that should not be there and whose content a comparison shows."""


class Format(StrEnum):
    """The form of a build: all are folders but the wheel."""

    PACKAGE = "package"
    WHEEL = "wheel"
    HF_KERNEL = "hf-kernel"

    @property
    def folder(self) -> Path:
        """The default of ``--out``."""
        return Path("generated" if self is Format.PACKAGE else "dist")


def diff(directory: Path, expected: Mapping[str, str]) -> list[str]:
    """Return a unified diff from the files on disk to ``expected``, aside from what depends on the toolchain.

    It is empty only if the bytes are the same, as ``write`` compares them. A file that should not be there is shown if
    it is a short text, and named otherwise. Compiled kernels need only be those that the manifest on disk lists.
    """
    if not directory.is_dir():
        return [f"committed/{directory.name}: must be a folder, got {'a file' if directory.exists() else 'none'}"]
    strays = owned.scan(directory).others(expected)
    lines: list[str] = []
    for path in sorted({*expected, *(stray for stray in strays if not stray.startswith(COMPILED))}):
        if path in strays:
            text = _stray_text(directory / path)
            lines += _unified(directory, path, text, "") if text else [f"Only in committed/{directory.name}: {path}"]
        else:
            lines += _changes(directory, path, expected[path])
    return lines + _compiled_changes(directory, strays)


def _compiled_changes(directory: Path, strays: Iterable[str]) -> list[str]:
    """Return a line for each compiled kernel on disk that the manifest there lists otherwise, or that either lacks."""
    manifest = directory / MANIFEST
    try:
        every = owned.listed_hashes(manifest.read_bytes())
    except OSError:  # which is a change itself
        every = {}
    listed = {path: digest for path, digest in every.items() if path.startswith(COMPILED)}
    here = {path for path in strays if path.startswith(COMPILED) and not path.endswith("/")}
    lines = [f"Only in committed/{directory.name}: {path}" for path in sorted(here - listed.keys())]
    for path, digest in sorted(listed.items()):
        if not _has_hash(directory / path, digest):
            lines.append(f"committed/{directory.name}/{path}: must have the hash that {MANIFEST} lists, {digest}")
    return lines


def _has_hash(path: Path, digest: str) -> bool:
    try:
        return not path.is_symlink() and owned.hash_of(path.read_bytes()) == digest
    except OSError:
        return False


def _changes(directory: Path, path: str, text: str) -> list[str]:
    """Return the lines that lead from a file on disk, which may be missing, to ``text``."""
    place, file = f"{directory.name}/{path}", directory / path
    try:
        data = file.read_bytes()
    except OSError:  # missing, or a folder: none of it is the package's file
        return _unified(directory, path, "", text) or [f"Only in rendered/{directory.name}: {path}"]
    if file.is_symlink():
        return [f"committed/{place}: must be a file, got a link"]
    old, same = data.decode(errors="replace"), data == text.encode()
    if path == MANIFEST:
        old, text = _of_sources(old), _of_sources(text)
        same = old == text
    return [] if same else _unified(directory, path, old, text) or [f"committed/{place}: line ends differ"]


def _unified(directory: Path, path: str, old: str, new: str) -> list[str]:
    one, other = (f"{folder}/{directory.name}/{path}" for folder in ("committed", "rendered"))
    return list(difflib.unified_diff(old.splitlines(), new.splitlines(), one, other, lineterm=""))


def _stray_text(path: Path) -> str:
    """Return the content of a file, or an empty string if it is long or not text."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() and path.stat().st_size <= SHOWN else ""
    except UnicodeDecodeError:
        return ""


def _of_sources(manifest: str) -> str:
    """Return a manifest without resources and compiled kernels; as it is, if m2gen would not write those lines so."""
    try:
        parsed = json.loads(manifest)
        if json.dumps(parsed, indent=2).splitlines() != manifest.splitlines():
            return manifest
        end = "\n" if manifest == json.dumps(parsed, indent=2) + "\n" else ""
        del parsed["resources"]
        parsed["files"] = {path: digest for path, digest in parsed["files"].items() if not path.startswith(COMPILED)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return manifest
    return json.dumps(parsed, indent=2) + end


def check_place(directory: Path, files: Mapping[str, str]) -> None:
    """Raise the errors of ``write`` that can be found without writing."""
    check_folder(directory.parent)
    real = resolved(directory)
    check_new(directory, real)
    with locked(real.parent):
        owned.refuse_others(directory, real, _encoded(files))


def write(directory: Path, files: Mapping[str, str]) -> None:
    """Make ``directory`` hold exactly ``files``, beside a ``.git`` that it may have; write nothing if it does already.

    Readers, even after a kill, find the old files or the new (file by file, if ``_update`` has to do it). Concurrent
    builds wait for each other. A link is followed, and stays.

    Raises PlaceError if the directory holds files that m2gen did not write, or cannot be written.
    """
    check_folder(directory.parent)
    real, contents = resolved(directory), _encoded(files)
    with os_errors_as(PlaceError, f"{directory} must be writable"):
        real.parent.mkdir(parents=True, exist_ok=True)
        with locked(real.parent) as alone:
            owned.refuse_others(directory, real, contents)
            if alone:
                owned.clean(real.parent, real.name)
                owned.clean(real)
            if owned.same(real, contents):
                return
            if os.path.lexists(real / owned.GIT) or not _replace(directory, real, contents):
                _update(directory, real, contents)


def _encoded(files: Mapping[str, str]) -> dict[str, bytes]:
    """Return files as bytes, the manifest first, so that a half-written folder is known to be m2gen's."""
    return {path: files[path].encode() for path in sorted(files, key=lambda path: (path != MANIFEST, path))}


def _replace(shown: Path, real: Path, contents: Mapping[str, bytes]) -> bool:
    """Replace the old folder by a new one in one step; return False if the system cannot."""
    staging = real.parent / owned.staging_name(real.name)
    try:
        staging.mkdir()
    except OSError:
        if real.is_dir():  # the folder may be writable though its parent is not
            return False
        raise
    try:
        for path, data in contents.items():
            write_file(staging / path, data)
        if not real.is_dir() and _renamed(staging, real):
            return True
        staging.chmod(real.stat().st_mode & 0o7777)
        if not exchanged(staging, real):
            return False
        try:
            owned.refuse_others(shown, staging, contents)
        except PlaceError:  # a file was put there since the last check
            exchanged(staging, real)
            raise
        time.sleep(GRACE)
        return True
    finally:
        owned.remove(staging, {*contents, *owned.listed_in(staging)})


def _renamed(staging: Path, real: Path) -> bool:
    """Rename a folder to an unused name; return False if another build took it first."""
    try:
        staging.rename(real)
    except OSError:
        if real.is_dir():
            return False
        raise
    return True


def _update(shown: Path, real: Path, contents: Mapping[str, bytes]) -> None:
    """Replace the files of a folder one by one: it has a repository, is a mount, or cannot be exchanged.

    No file is missing or half written at any time, but a reader may find some old and some new files. A manifest that
    lists both comes first, so that the next build knows them after a kill.
    """
    for _ in range(ATTEMPTS):
        _update_once(real, contents)
        if owned.same(real, contents):
            return
    raise PlaceError(f"{shown} must be left to one build at a time, got others that wrote to it")


def _update_once(real: Path, contents: Mapping[str, bytes]) -> None:
    before, tree = owned.listed_in(real), owned.scan(real)
    staging = real / owned.staging_name()
    gone = (before & tree.files) - contents.keys() - {MANIFEST}
    barring = gone & {str(parent) for path in contents for parent in PurePosixPath(path).parents}
    changed = [path for path in contents if path != MANIFEST and not owned.equal(real / path, contents[path])]
    try:
        staging.mkdir()
        if MANIFEST in contents:
            _move(staging, real, MANIFEST, _listing_also(contents[MANIFEST], before))
        for path in barring:  # a link in a folder's place would lead new files elsewhere
            (real / path).unlink(missing_ok=True)
        for path in sorted(changed, key=lambda path: (path == "__init__.py", path)):  # it imports the others
            _move(staging, real, path, contents[path])
        for path in (gone - barring) | tree.bytecode:
            (real / path).unlink(missing_ok=True)
        owned.prune(real, tree.folders)
        if MANIFEST in contents:
            _move(staging, real, MANIFEST, contents[MANIFEST])
    finally:
        owned.remove(staging, contents)


def _move(staging: Path, real: Path, path: str, data: bytes) -> None:
    """Replace one file in one step."""
    write_file(staging / path, data)
    (real / path).parent.mkdir(parents=True, exist_ok=True)
    (staging / path).replace(real / path)


def _listing_also(manifest: bytes, before: Iterable[str]) -> bytes:
    """Return a manifest that also lists the files ``before``."""
    parsed = json.loads(manifest)
    gone = dict.fromkeys(sorted({*before} - {MANIFEST}), "0" * 16)
    return json.dumps({**parsed, "files": {**gone, **parsed["files"]}}, indent=2).encode()
