"""Small packages for tests of what builds write, and what is on disk afterwards; needs neither torch nor triton."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from m2gen.package import owned

MODULES = ("kernels/__init__.py", "kernels/a.py", "kernels/b.py", "layer.py", "op.py", "__init__.py")
IMPORTS = "from . import layer, op\nfrom .kernels import a, b\n"
MANIFEST = owned.MANIFEST


def files(version: str, *more: str) -> dict[str, str]:
    """Return a package whose every module has ``VERSION``, and whose length depends on it, with its manifest."""
    made = dict.fromkeys((*MODULES, *more), f"VERSION = {version!r}\n")
    made["__init__.py"] += IMPORTS
    facts = {"name": "p", "m2gen": "0.1.0", "version": version, "files": owned.hashes(made)}
    return {**made, MANIFEST: json.dumps(facts)}


def on_disk(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder but bytecode, whoever wrote it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def complete(folder: Path) -> str:
    """Return the version of a package after checking that exactly the files of its manifest are there, unharmed."""
    found = {path: data for path, data in on_disk(folder).items() if path.split("/")[0] != ".git"}
    manifest = json.loads(found.pop(MANIFEST))
    assert {path: hashlib.sha256(data).hexdigest()[:16] for path, data in found.items()} == manifest["files"]
    return str(manifest["version"])
