"""Compiled kernels that a package may bring along, for one version of Triton: files that it puts into Triton's cache.

Triton names what it compiled by a hash of everything that the result depends on: itself, its assembler, the source, the
arguments' types, the options and the environment. A kernel of another hash than a launch looks for is never found, so
nothing here decides what fits; only whether a file is whole.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = "compiled"
BINARIES = ("cubin", "hsaco")
"""Triton's names of machine code; its text before that, such as PTX, is not brought along."""


def place_of(arch: str, module: str, kernel: str, digest: str) -> str:
    """Return the path in a package of a kernel of a module that Triton at hand names by ``digest``."""
    version = importlib.import_module("triton").__version__
    return f"{FOLDER}/triton-{version}/{arch}/{module}/{kernel}-{digest}.json"


def provide(kernels: Iterable[ModuleType], arch: str) -> int:
    """Put a package's compiled kernels of some modules into Triton's cache, where that has none of the same hash.

    Returns how many were put there. A file that is cut off or altered, or a cache that cannot be written, is no error:
    Triton compiles what it does not find.
    """
    package = Path(__file__).parent
    try:
        if not (package / FOLDER).is_dir():
            return 0
        folders = [(package / place_of(arch, name_of(module), "", "")).parent for module in kernels]
        paths = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    except OSError:  # folders that may not be read
        return 0
    return sum(map(_put, paths))


def name_of(kernels: ModuleType) -> str:
    """Return a module's name within ``kernels``."""
    return kernels.__name__.rpartition(".")[2]


def _put(path: Path) -> bool:
    """Put one kernel into Triton's cache, and return whether it was missing there."""
    name, _, digest = path.stem.rpartition("-")
    try:
        cache = _cache(digest)
        group = f"{name}.json"
        known = cache.get_group(group) or {}
        if group in known and any(file.endswith(BINARIES) for file in known):
            return False
        files = {file: _unpacked(packed) for file, packed in json.loads(path.read_bytes()).items()}
        cache.put_group(group, {file: cache.put(data, file) for file, data in files.items()})
    except Exception:  # whatever is wrong with a file, or with a cache of the user's own class, compiling is right
        return False
    return True


def entry_of(kernel: str, digest: str) -> str:
    """Return the text of the file that brings along a kernel from Triton's cache; raises KeyError if it is not there.

    The text is the same wherever Triton and its cache are.
    """
    group = f"{kernel}.json"
    found: Mapping[str, str] = _cache(digest).get_group(group) or {}
    (binary,) = (file for file in found if file.endswith(BINARIES)) if found else ("",)
    facts = json.loads(Path(found[group]).read_bytes())
    facts["extern_libs"] = [[name, Path(path).name] for name, path in facts.get("extern_libs") or ()]
    files = {binary: Path(found[binary]).read_bytes(), group: json.dumps(facts).encode()}
    return json.dumps({file: _packed(data) for file, data in files.items()}, indent=1) + "\n"


def _packed(data: bytes) -> dict[str, Any]:
    packed = base64.b64encode(zlib.compress(data, 9)).decode()
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "data": packed}


def _unpacked(packed: Mapping[str, Any]) -> bytes:
    """Return a file as it was; raises ValueError or zlib.error if it is no longer whole."""
    data = zlib.decompress(base64.b64decode(packed["data"], validate=True))
    if (len(data), hashlib.sha256(data).hexdigest()) != (packed["bytes"], packed["sha256"]):
        raise ValueError("a compiled kernel must have the content that its hash names")
    return data


def _cache(digest: str) -> Any:
    """Return Triton's cache of one kernel: files, or whatever the user has in their place."""
    return importlib.import_module("triton.runtime.cache").get_cache_manager(digest)
