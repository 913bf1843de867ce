"""Write the tables of a run of ``m2gen bench --layers`` into a page, between two marks.

python tools/layer_tables.py docs/data/layers_h200.json docs/model-step.md --apart docs/data/layers_published_h200.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from m2gen.bench.layers.document import LayerDocument, LayerRow, load_layers
from m2gen.bench.layers.kinds import Part
from m2gen.cli.show.bench import ms_text
from m2gen.cli.show.layers import heading, shown_name
from m2gen.db.exchange import write_whole
from m2gen.errors import M2genError, UsageError, os_errors_as

BEGIN, END = "<!-- tables of tools/layer_tables.py -->", "<!-- end of tables -->"
LONGEST = 8
"""Kernels of a step that are listed, the longest first."""


def tables(document: LayerDocument, title: str) -> Iterator[str]:
    """Yield the lines of a run's tables under a heading."""
    here = document.environment
    yield from ("", f"### {title}", "", f"{here.device}, driver {here.driver}, m2gen {document.m2gen}.")
    rows = [row for row in document.layer_rows if not row.failure]
    for name in dict.fromkeys(heading(row) for row in rows):
        of_it = [row for row in rows if heading(row) == name]
        yield from ("", f"**{name}**", "")
        yield from _tokens(of_it) if of_it[0].call.decodes else _sequences(of_it)
    yield from ("", "Versions: " + "; ".join(dict.fromkeys(map(_versions, rows))) + ".")
    marked = dict.fromkeys((row.name, row.unverified) for row in rows if row.unverified)
    yield from (f"\nTiming only, {name}: {why}." for name, why in marked)
    failed = dict.fromkeys((row.name, heading(row), row.failure) for row in document.layer_rows if row.failure)
    yield from (f"\nNot timed, {name} ({where}): {why}." for name, where, why in failed)


def _sequences(rows: Sequence[LayerRow]) -> Iterator[str]:
    parts = " | ".join(f"{part} ms" for part in Part)
    graphs = any(row.captured for row in rows)  # runs from before steps were captured have none
    yield f"| layer | forward | step |{' step as a graph |' if graphs else ''} extra memory | {parts} |"
    yield "| --- " * (4 + graphs + len(Part)) + "|"
    for row in rows:
        assert row.forward is not None
        assert row.step is not None
        times = f"{ms_text(row.forward.median_ms)} ms | {ms_text(row.step.median_ms)} ms"
        if graphs:
            times += f" | {ms_text(row.captured.median_ms)} ms" if row.captured else " | not captured"
        of_parts = " | ".join(ms_text(row.parts[part]) if row.kernels else "" for part in Part)
        yield f"| {shown_name(row)} | {times} | {row.extra_bytes / 1e9:.3f} GB | {of_parts} |"
    for row in (row for row in rows if row.kind.generated and row.kernels):
        longest = (f"`{k.name[:60]}` {ms_text(k.ms)} ({k.launches:g}, {k.part})" for k in row.kernels[:LONGEST])
        yield f"\nThe longest kernels of a step of {row.name}, ms (launches, part): {'; '.join(longest)}."


def _tokens(rows: Sequence[LayerRow]) -> Iterator[str]:
    yield "| layer | a token | weights and states read, states written once | times that |"
    yield "| --- | --- | --- | --- |"
    for row in rows:
        assert row.forward is not None
        floor = ("", "")
        if row.floor_ms:
            floor = (f"{1e3 * row.floor_ms:.1f} us", f"{row.forward.median_ms / row.floor_ms:.2f}")
        yield f"| {shown_name(row)} | {1e3 * row.forward.median_ms:.1f} us | {floor[0]} | {floor[1]} |"


def _versions(row: LayerRow) -> str:
    return f"{row.name} on {', '.join(f'{name} {version}' for name, version in row.versions.items())}"


def written(page: str, run: Path | None, before: Path | None, apart: Sequence[Path] = ()) -> str:
    """Return a page with the tables of a run, an earlier one's before them and other machines' behind them.

    There are none if there is no run.
    """
    start, end = page.find(BEGIN) + len(BEGIN), page.find(END)
    if not len(BEGIN) <= start <= end:
        raise UsageError(f"a page must have {BEGIN} and, below it, {END}, got none")
    lines: list[str] = []
    for path, title in ((before, "Before"), (run, "Now"), *((path, "On another machine") for path in apart)):
        if path is not None:
            document = load_layers(path)
            if document is None:
                raise UsageError(f"{path}: $ must be what `m2gen bench --layers --json` prints")
            lines += tables(document, title)
    body = "\n".join([*lines, "", ""]) if lines else "\n"
    return f"{page[:start]}\n{body.lstrip()}{page[end:]}" if lines else f"{page[:start]}\n{page[end:]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--before", type=Path, help="an earlier run, whose tables come first")
    parser.add_argument("--apart", type=Path, action="append", default=[], help="a run elsewhere; its tables come last")
    given = parser.parse_args(arguments)
    with os_errors_as(UsageError, f"{given.page} must be readable and writable"):
        text = written(given.page.read_text(encoding="utf-8"), given.run, given.before, given.apart)
        write_whole(given.page, text.encode())


if __name__ == "__main__":
    try:
        main()
    except M2genError as error:
        raise SystemExit(f"layer_tables: {error}") from None
