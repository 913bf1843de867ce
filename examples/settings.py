"""Values of config files, and changes of them on the command line: what examples share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
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
