"""``m2gen/runtime/`` as packages contain it: copies of its modules, and ``built.py`` with the package's facts."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from m2gen.kernels.literals import literal

RUNTIME = Path(__file__).resolve().parents[1] / "runtime"
BUILT = "built.py"


@cache
def sources() -> Mapping[str, str]:
    """Return the text of every module that packages copy, by its path in them."""
    paths = {path.relative_to(RUNTIME).as_posix(): path for path in sorted(RUNTIME.rglob("*.py"))}
    return {
        name: path.read_text(encoding="utf-8") for name, path in paths.items() if name not in (BUILT, "__init__.py")
    }


@cache
def _skeleton() -> str:
    return (RUNTIME / BUILT).read_text(encoding="utf-8")


@cache
def runtime_hash() -> str:
    """Return 12 hex digits that change when any module of the runtime does."""
    digest = hashlib.sha256()
    for name, text in {**sources(), BUILT: _skeleton()}.items():
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:12]


def copied(header: str, text: str) -> str:
    """Return a module under a header, and otherwise as it is."""
    return "".join(f"# {line}\n" for line in header.splitlines()) + text


def built(header: str, facts: Mapping[str, object]) -> str:
    """Return the runtime's ``built.py`` with a value for each of its names; raises KeyError for other names."""
    lines = _skeleton().splitlines(keepends=True)
    values = {
        node.target.id: node.value
        for node in ast.parse(_skeleton()).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
    }
    if values.keys() != facts.keys():
        raise KeyError(f"{BUILT} must have a value for each of {sorted(values)}, got {sorted(facts)}")
    for name, value in values.items():
        line = lines[value.lineno - 1]
        lines[value.lineno - 1] = line[: value.col_offset] + literal(facts[name]) + line[value.end_col_offset :]
    return copied(header, "".join(lines))
