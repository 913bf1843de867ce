"""Messages about everything that can be wrong with a spec: one printable line for each problem."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from m2gen.spec.contract import CONTRACT, Breach
from m2gen.spec.model import HeadGrid, Layer, Numerics, Spec, Tuning, Workload

KeyPath = tuple[str | int, ...]
Position = tuple[int, int]
"""Line and column, from 0."""

_LONGEST_VALUE = 60
_KEY_ERROR = "[key]"
_MODELS: dict[KeyPath, type[BaseModel]] = {
    (): Spec,
    ("numerics",): Numerics,
    ("tuning",): Tuning,
    ("layers", "*"): Layer,
    ("layers", "*", "heads"): HeadGrid,
    ("layers", "*", "workloads"): Workload,
}


class SpecProblem(NamedTuple):
    """One thing that is wrong with a spec, and its place."""

    path: KeyPath
    message: str
    position: Position | None = None
    """Given if it is not the position of ``path``."""


def printable(text: str) -> str:
    """Return ``text`` with its unprintable characters escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _written(value: object) -> str:
    """Return ``value`` as YAML, strings quoted."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case list() | tuple():
            return f"[{', '.join(map(_written, value))}]"
        case dict():
            return f"{{{', '.join(f'{printable(str(key))}: {_written(item)}' for key, item in value.items())}}}"
        case BaseModel():
            return _written(value.model_dump(mode="json"))
        case str():
            return repr(str(value))
    return repr(value)


def short(value: object) -> str:
    """Return ``value`` as YAML on one line of at most 60 characters."""
    text = _written(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def json_path(path: KeyPath) -> str:
    """Return ``path`` as ``$.layers.base.head_dim[1]``."""
    plain = (isinstance(part, str) and part.isascii() and part.isidentifier() and len(part) <= 64 for part in path)
    return "$" + "".join(
        f".{part}" if is_plain else f"[{short(part)}]" for part, is_plain in zip(path, plain, strict=True)
    )


def must(contract: str, given: object) -> str:
    """Return the message about a broken contract."""
    return f"must {contract}, got {short(given)}"


def _resolve(data: object, location: Iterable[str | int]) -> KeyPath:
    """Return pydantic's location as the file has it: a scalar that stands for a list of one has no index."""
    path: list[str | int] = []
    node = data
    for part in location:
        if isinstance(part, int) and not isinstance(node, list):
            continue
        path.append(part)
        if isinstance(node, Mapping):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
    return tuple(path)


def _known_keys(path: KeyPath) -> list[str]:
    """Return the keys that the mapping at ``path`` may have."""
    pattern = tuple("*" if depth == 1 and path[0] == "layers" else part for depth, part in enumerate(path))
    model = _MODELS[tuple(part for part in pattern if isinstance(part, str))]
    return [field.alias or name for name, field in model.model_fields.items()]


def _unknown_key(path: KeyPath) -> str:
    known = _known_keys(path[:-1])
    near = get_close_matches(str(path[-1])[:_LONGEST_VALUE].lower(), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    return f"is not a known key ({hint})"


def _breach(data: object, location: KeyPath, breach: Breach) -> SpecProblem:
    where = location[:-1] if location and location[-1] == _KEY_ERROR else location + breach.path
    return SpecProblem(_resolve(data, where), must(breach.must, breach.given))


def _messages(data: object, error: ErrorDetails) -> Iterator[SpecProblem]:
    path = _resolve(data, error["loc"])
    match error["type"]:
        case str(kind) if kind == CONTRACT:
            yield from (_breach(data, error["loc"], breach) for breach in error["ctx"]["breaches"])
        case "missing":
            yield SpecProblem(path, "is missing")
        case "extra_forbidden":
            yield SpecProblem(path, _unknown_key(path))
        case "too_short":
            yield SpecProblem(path, must("have at least one entry", error["input"]))
        case "model_type" | "dict_type" | "mapping_type":
            yield SpecProblem(path, must("be a mapping", error["input"]))
        case "bool_type":
            yield SpecProblem(path, must("be true or false", error["input"]))
        case _:
            yield SpecProblem(path, f"must be valid ({printable(error['msg'])}), got {short(error['input'])}")


def problems_of(data: object, error: ValidationError) -> Iterator[SpecProblem]:
    """Yield what pydantic found wrong with ``data``, as m2gen's messages."""
    for detail in error.errors(include_url=False):
        yield from _messages(data, detail)
