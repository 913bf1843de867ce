"""Tables for people: aligned, without frames, and wrapped between words on a narrow terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

GAP = "  "
PAGE = 100
"""Width of notes in characters if there is no terminal."""
NARROWEST = 20
"""Minimum width of a wrapped column in characters."""
_NUMBER = re.compile(r"[-+±]?\d[\d.,]*(e[-+]?\d+)?( ?%|x)?")


@dataclass(frozen=True)
class Table:
    """Rows under column titles, with numbers aligned to the right, and notes below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any] | str]
    """Rows with a cell for every column, or headings of the rows below. Empty columns are left out."""
    notes: Sequence[str] = ()

    def lines(self, width: int | None) -> Iterator[tuple[str, str]]:
        """Yield the lines and their styles.

        If the table is wider than ``width``, its widest columns of text are wrapped between words. If ``width`` is
        None, every row is one line.
        """
        yield from ((line, "bold") for line in _wrapped(self.title, width))
        rows = [row if isinstance(row, str) else list(map(_text, row)) for row in self.rows]
        body = [row for row in rows if not isinstance(row, str)]
        shown = [i for i in range(len(self.columns)) if any(row[i] for row in body)]
        columns = [self.columns[i] for i in shown]
        indent = "  " if len(body) < len(rows) else ""
        grid = _Grid.of(columns, [[row[i] for i in shown] for row in body], width and width - len(indent))
        yield from ((indent + line, "bold") for line in grid.lines(columns))
        for row in rows:
            if isinstance(row, str):
                yield row, "bold"
            else:
                yield from ((indent + line, "") for line in grid.lines([row[i] for i in shown]))
        yield from ((line, "") for note in self.notes for line in _wrapped(note, width or PAGE))


def print_tables(tables: Iterable[Table]) -> None:
    """Print tables within the terminal's width, with empty lines between them; elsewhere every row is one line."""
    console = Console(highlight=False)
    width = console.width if console.is_terminal else None
    for number, table in enumerate(tables):
        if number:
            console.print()
        for line, style in table.lines(width):
            console.print(Text(line, style), soft_wrap=True)


@dataclass(frozen=True)
class _Grid:
    """The widths of columns, and which of them hold numbers."""

    widths: list[int]
    numeric: list[bool]

    @classmethod
    def of(cls, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> _Grid:
        """Return columns as wide as their widest cell, with text narrowed until the table fits ``width``."""
        cells = list(zip(columns, *rows, strict=True))
        widths = [max(map(len, column)) for column in cells]
        numeric = [all(_NUMBER.fullmatch(cell) for cell in column[1:] if cell) for column in cells]
        least = [
            wide if number else min(wide, max(NARROWEST, *(len(word) for cell in column for word in cell.split())))
            for wide, number, column in zip(widths, numeric, cells, strict=True)
        ]
        while width is not None and sum(widths) + len(GAP) * (len(widths) - 1) > width:
            spare = [i for i in range(len(widths)) if widths[i] > least[i]]
            if not spare:
                break
            widths[max(spare, key=lambda i: widths[i])] -= 1
        return cls(widths, numeric)

    def lines(self, cells: Sequence[str]) -> Iterator[str]:
        """Yield the lines of a row."""
        wrapped = [_wrapped(cell, wide) for cell, wide in zip(cells, self.widths, strict=True)]
        for i in range(max(map(len, wrapped), default=0)):
            parts = [lines[i] if i < len(lines) else "" for lines in wrapped]
            placed = (
                part.rjust(wide) if number else part.ljust(wide)
                for part, wide, number in zip(parts, self.widths, self.numeric, strict=True)
            )
            yield GAP.join(placed).rstrip()


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell)


def _wrapped(text: str, width: int | None) -> list[str]:
    if width is None or len(text) <= width:
        return [text]
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
