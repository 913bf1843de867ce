"""Read YAML to plain values and their positions: the safe, bounded subset that a spec needs.

One document of mappings, lists and scalars. Scalars follow YAML 1.2 (``yes``, ``1_000``, ``1:30`` and dates are
strings), and integers are plain decimal. Keys are text. Tags and aliases are refused, so nothing can be constructed
or multiplied; size, nesting and node count are bounded, so no input is expensive.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import yaml

from m2gen.errors import SpecError
from m2gen.spec.problems import KeyPath, Position, SpecProblem, printable, short

MAX_BYTES = 2**20
MAX_DEPTH = 16
MAX_NODES = 20_000

_CONSTANTS: dict[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]{1,99}|[0-9]{1,99}(\.[0-9]{0,99})?)([eE][-+]?[0-9]{1,9})?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Source:
    """The values of a file, the position of each, and the problems of repeated keys."""

    location: str
    value: object = None
    positions: dict[KeyPath, Position] = field(default_factory=dict)
    problems: list[SpecProblem] = field(default_factory=list)

    def position(self, path: KeyPath) -> Position:
        """Return the line and column of ``path``, or of its innermost parent that the file has."""
        while path not in self.positions and path:
            path = path[:-1]
        return self.positions.get(path, (0, 0))


def plain(text: str) -> object:
    """Return the value of an unquoted scalar."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and not _LEADING_ZERO.fullmatch(text):
        return float(text)
    if _SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".", ""))
    return text


class _Mark(Protocol):
    """The position in marks of both of PyYAML's parsers."""

    @property
    def line(self) -> int: ...

    @property
    def column(self) -> int: ...


def _at(mark: _Mark | None) -> Position:
    return (mark.line, mark.column) if mark else (0, 0)


class _Reader:
    """Builds a ``Source`` from the parser's events; recursion is bounded by ``MAX_DEPTH``."""

    def __init__(self, text: str, location: str) -> None:
        self.source = Source(location)
        self.nodes = 0
        self.parser = yaml.SafeLoader(text)

    def refuse(self, position: Position, message: str) -> NoReturn:
        """Raise SpecError with the one problem after which nothing more is read."""
        line, column = position
        raise SpecError([f"{self.source.location}: line {line + 1}, column {column + 1} {message}"])

    def next(self) -> yaml.Event:
        """Return the next event; refuse what is not valid YAML."""
        try:
            event: yaml.Event = self.parser.get_event()  # type: ignore[no-untyped-call]
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.refuse(_at(mark), f"must be valid YAML ({printable(str(error.problem or error.context))})")
        except (ValueError, OverflowError):  # PyYAML converts some numbers unchecked
            self.refuse(_at(self.parser.get_mark()), "must be valid YAML (an escape or a version is out of range)")
        return event

    def document(self) -> Source:
        """Read the only document."""
        self.next()
        if isinstance(self.next(), yaml.StreamEndEvent):
            raise SpecError([f"{self.source.location}: $ must be a mapping, got an empty file"])
        self.source.value = self.node(self.next(), ())
        self.next()
        event = self.next()
        if not isinstance(event, yaml.StreamEndEvent):
            self.refuse(_at(event.start_mark), "must not start another document")
        return self.source

    def check(self, event: yaml.Event, depth: int) -> Position:
        """Return the position of ``event``; refuse what no spec may contain."""
        position = _at(event.start_mark)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self.refuse(position, f"must not exceed {MAX_NODES} values and keys")
        if isinstance(event, yaml.AliasEvent):
            self.refuse(position, f"must not be an alias, got {short(f'*{event.anchor}')}")
        tag = getattr(event, "tag", None)
        if tag is not None:
            self.refuse(position, f"must not have a tag, got {short(tag.replace('tag:yaml.org,2002:', '!!'))}")
        if depth > MAX_DEPTH:
            self.refuse(position, f"must not nest deeper than {MAX_DEPTH} levels")
        return position

    def node(self, event: yaml.Event, path: KeyPath) -> object:
        """Read the value at ``path``, whose first event is ``event``."""
        self.source.positions.setdefault(path, self.check(event, len(path)))
        if isinstance(event, yaml.ScalarEvent):
            return plain(event.value) if event.implicit[0] else self.text(event)
        return self.sequence(path) if isinstance(event, yaml.SequenceStartEvent) else self.mapping(path)

    def text(self, event: yaml.ScalarEvent) -> str:
        """Return the text of a scalar; refuse lone surrogates, which escapes can spell."""
        value: str = event.value
        if _SURROGATE.search(value):
            self.refuse(_at(event.start_mark), f"must be Unicode text, got {short(value)}")
        return value

    def sequence(self, path: KeyPath) -> list[object]:
        """Read the entries of the list at ``path``."""
        values: list[object] = []
        while not isinstance(event := self.next(), yaml.SequenceEndEvent):
            values.append(self.node(event, (*path, len(values))))
        return values

    def mapping(self, path: KeyPath) -> dict[str, object]:
        """Read the mapping at ``path``; a repeated key is a problem, and the first value is kept."""
        values: dict[str, object] = {}
        while not isinstance(event := self.next(), yaml.MappingEndEvent):
            position = self.check(event, len(path))
            if not isinstance(event, yaml.ScalarEvent):
                self.refuse(position, "must be a key, got a list or a mapping")
            key = self.text(event)
            here = (*path, key)
            if key in values:
                message = f"must be given once, got it again on line {position[0] + 1}"
                self.source.problems.append(SpecProblem(here, message, position))
            self.source.positions.setdefault(here, position)
            value = self.node(self.next(), here)
            values.setdefault(key, value)
        return values


def _place(before: str) -> str:
    """Return the line and column that follow ``before``."""
    lines = _LINE_BREAK.split(before)
    return f"line {len(lines)}, column {len(lines[-1]) + 1}"


def _decode(text: bytes, location: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        place = _place(text[: error.start].decode())
        raise SpecError([f"{location}: {place} must be UTF-8, got byte 0x{text[error.start]:02x}"]) from None


def read(text: str | bytes, location: str) -> Source:
    """Return what ``text`` holds; raises ``SpecError`` with one located line where it is not a spec's YAML."""
    if len(text) > MAX_BYTES:
        raise SpecError([f"{location}: $ must be at most {MAX_BYTES} bytes long"])
    if isinstance(text, bytes):
        text = _decode(text, location)
    try:
        reader = _Reader(text, location)
    except yaml.reader.ReaderError as error:
        place = _place(text[: error.position])
        raise SpecError([f"{location}: {place} must be printable text, got {text[error.position]!r}"]) from None
    return reader.document()
