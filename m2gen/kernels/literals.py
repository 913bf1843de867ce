"""Values as the Python that generated modules write them in."""

from __future__ import annotations

import json
from dataclasses import dataclass

WIDTH = 110
"""Characters that a line of a literal stays below."""


@dataclass(frozen=True)
class Code:
    """Python that stands for a value."""

    text: str


def literal(x: object, indent: str = "", taken: int = 0) -> str:
    """Return a value as Python, on several lines where it is a dict or long.

    ``indent`` is that of the line on which it begins, of which it finds some characters ``taken``.
    """
    inner = f"{indent}    "
    match x:
        case Code():
            return x.text
        case dict():
            entries = "".join(f"{inner}{_entry(literal(key), value, inner)},\n" for key, value in x.items())
            return f"{{\n{entries}{indent}}}" if x else "{}"
        case tuple():
            short = f"({', '.join(map(literal, x))}{',' if len(x) == 1 else ''})"
            entries = "".join(f"{inner}{literal(entry, inner)},\n" for entry in x)
            return short if len(indent) + taken + len(short) < WIDTH else f"(\n{entries}{indent})"
        case str():
            return json.dumps(x)
        case _:
            return repr(x)


def _entry(key: str, value: object, indent: str) -> str:
    text = f"{key}: {literal(value, indent, len(key) + 2)}"
    first = text.split("\n", 1)[0]
    return text if len(indent) + len(first) < WIDTH else f"{key}:\n{indent}    {literal(value, indent)}"
