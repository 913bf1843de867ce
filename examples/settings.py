"""Values of config files, and changes of them on the command line: what examples share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

KINDS: dict[type, str] = {dict: "a mapping", list: "a list", int: "a number", float: "a number"}
"""What a value must be where a config file has one of a type; others may be anything."""


def changes_of(given: Sequence[str]) -> dict[str, Any]:
    """Return the values of ``--set KEY=VALUE``; what is no such pair, or no YAML, ends the program."""
    changes = {}
    for item in given:
        key, sign, value = item.partition("=")
        if not sign:
            raise SystemExit(f"--set must be KEY=VALUE, got {item!r}")
        try:
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise SystemExit(f"--set {key} must be YAML, got {value!r}") from None
    return changes


def config_of(path: Path, known: set[str], others: Sequence[str] = ()) -> dict[str, Any]:
    """Read a config file that has all of ``known`` and may have ``others``; what is wrong with it ends the program."""
    found = _mapping_of(path)
    wrong = sorted((known - found.keys()) | (found.keys() - known - {*others}))
    if wrong:
        raise SystemExit(f"{path} must give {', '.join(sorted(known))}; see {', '.join(wrong)}")
    return found


def merged(path: Path, changes: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Read a config file and change some of its values; what is wrong with either ends the program."""
    found = _mapping_of(path)
    wrong = sorted((found.keys() ^ known) | (changes.keys() - known))
    if wrong:
        raise SystemExit(f"{path} and --set must give {', '.join(sorted(known))}; see {', '.join(wrong)}")
    for key, value in changes.items():
        kind = KINDS.get(type(found[key]))
        if kind and value is not None and KINDS.get(type(value)) != kind:
            raise SystemExit(f"--set {key} must be {kind}, got {value!r}")
    return found | dict(changes)


def _mapping_of(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} must be YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise SystemExit(f"{path} must be a mapping, got {found!r}")
    return found


@contextlib.contextmanager
def readable(path: Path, given: str = " and --set") -> Iterator[None]:
    """End the program in one line where values within others are not as a config, and what is ``given``, needs them."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise SystemExit(f"{path}{given} must give values of the kinds that this command has, got {said}") from None


def check(path: Path, config: Any, free: Collection[str] = (), empty: Collection[str] = (), where: str = "") -> None:
    """End the program where a config, or one within it, has a value that is none of its field's.

    Integers must be 1 or more, but for those in fields whose names are in ``free``, numbers 0 or more, and lists must
    have entries, but for those in ``empty``. Fields of other types are not looked at.
    """
    for field in fields(config):
        value, name = getattr(config, field.name), f"{where}{field.name}"
        for key, part in value.items() if isinstance(value, Mapping) else [("", value)]:
            if is_dataclass(part):
                check(path, part, free, empty, f"{name}.{key}." if key else f"{name}.")
        several = str(field.type).startswith("tuple[")
        if several and not value and field.name not in empty:
            raise SystemExit(f"{path} and --set: {name} must have entries, got none")
        rule, fits = _rule(str(field.type).removeprefix("tuple[").removesuffix(", ...]"), field.name in free)
        for x in value if several and isinstance(value, tuple) else (value,):
            if not fits(x):
                raise SystemExit(f"{path} and --set: {name} must be {rule}, got {x!r}")


def _rule(kind: str, free: bool) -> tuple[str, Callable[[Any], bool]]:
    """Return what a value of a type must be, and whether one is that."""
    if kind == "int" and free:
        return "an integer", lambda x: type(x) is int
    if kind == "int":
        return "an integer from 1 on", lambda x: type(x) is int and x >= 1
    if kind == "float":
        return "a number from 0 on", lambda x: type(x) in (int, float) and 0 <= x < math.inf
    if kind in ("bool", "str"):
        return {"bool": "true or false", "str": "a text"}[kind], lambda x: type(x).__name__ == kind
    return "", lambda _: True
