"""Print the results of ``m2gen bench --layers``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from m2gen.bench.entries import sized
from m2gen.bench.layers.document import LayerDocument, LayerRow, dump_layers, layer_row
from m2gen.bench.layers.kinds import Part
from m2gen.bench.layers.side_by_side import LayerTimes
from m2gen.cli.show.bench import median_cells, ms_text
from m2gen.cli.show.names import MARK
from m2gen.cli.show.report import Display, print_json
from m2gen.cli.show.table import Table, print_tables
from m2gen.db import Environment
from m2gen.errors import UsageError

TIME_COLUMNS = ("layer", "forward ms", "95 %", "step ms", "95 %", "as a graph ms", "95 %", "extra GB")
PART_COLUMNS = ("layer", *(f"{part} ms" for part in Part), "kernels", "step ms")
TOKEN_COLUMNS = ("layer", "token µs", "95 %", "read and written once µs", "times that", "extra GB")
VERSION_COLUMNS = ("layer", "versions")


def run_layers(
    results: Iterable[Sequence[LayerTimes]],
    environment: Environment,
    display: Display,
    keep: Callable[[LayerDocument], None],
) -> int:
    """Show results, also after an interruption, and keep them as they come; return 1 if a layer of m2gen's failed."""
    rows: list[LayerRow] = []
    try:
        for found in results:
            rows += map(layer_row, found)
            keep(LayerDocument(environment, tuple(rows)))
    except BaseException:
        if rows:
            with suppress(UsageError):  # the error that ended the run matters more
                show_layers(LayerDocument(environment, tuple(rows)), display)
        raise
    show_layers(LayerDocument(environment, tuple(rows)), display)
    return 1 if any(row.failure and row.kind.generated for row in rows) else 0


def show_layers(document: LayerDocument, display: Display) -> None:
    """Print the times of every layer, of a token, and what a step is made of."""
    if display.as_json:
        print_json(dump_layers(document))
    else:
        print_tables(layer_tables(document))


def layer_tables(document: LayerDocument) -> Iterator[Table]:
    """Yield the tables of a run, whose rows have their workload as heading."""
    passed = [row for row in document.layer_rows if not row.failure]
    sequences, tokens = ([row for row in passed if row.call.decodes is decodes] for decodes in (False, True))
    if sequences:
        notes = ["forward: without gradients; step: forward and backward; each called by the host, L2 cold"]
        notes += ["as a graph: a step that waits for no host, as a CUDA graph"]
        notes += [f"{row.name} is not captured: {row.uncaptured}" for row in sequences if row.uncaptured]
        title = f"Layers on {document.environment.device}"
        yield Table(title, TIME_COLUMNS, _sections(sequences, _time_cells), notes)
    if seen := [row for row in sequences if row.kernels]:
        note = "of the kernels of a step, by their names; what the parts leave of a step, the GPU waits"
        yield Table("What a step is made of", PART_COLUMNS, _sections(seen, _part_cells), [note])
    if tokens:
        note = "weights and states read once, states written once, at the GPU's peak bandwidth; in a CUDA graph"
        yield Table("A decoded token", TOKEN_COLUMNS, _sections(tokens, _token_cells), [note])
    versions = dict.fromkeys((row.name, _versions(row)) for row in document.layer_rows if row.versions)
    yield Table("Versions", VERSION_COLUMNS, list(versions))
    if unverified := [row for row in passed if row.unverified]:
        rows = _sections(unverified, lambda row: (row.name, row.unverified))
        yield Table("Timing only", ("layer", "why"), rows)
    if failed := [row for row in document.layer_rows if row.failure]:
        yield Table("Failed", ("layer", "why"), _sections(failed, lambda row: (row.name, row.failure)))


def _sections(rows: Iterable[LayerRow], cells: Callable[[LayerRow], Sequence[Any]]) -> list[Any]:
    lines: list[Any] = []
    before = None
    for row in rows:
        lines += [heading(row)] if row.workload != before else []
        lines.append(cells(row))
        before = row.workload
    return lines


def heading(row: LayerRow) -> str:
    """Return the name of a row's workload."""
    after = f" after {row.seq}" if row.call.decodes else ""
    return f"{row.layer}, hidden {row.hidden}, {sized(row.call, row.batch, row.seq)}{after}"


def shown_name(row: LayerRow) -> str:
    """Return the name of a row's layer, marked if its times are times only."""
    return row.name + (MARK if row.unverified else "")


def _time_cells(row: LayerRow) -> tuple[Any, ...]:
    times = (median_cells(times) for times in (row.forward, row.step, row.captured))
    return (shown_name(row), *(cell for both in times for cell in both), _gigabytes(row))


def _part_cells(row: LayerRow) -> tuple[Any, ...]:
    parts = row.parts
    launches = f"{sum(kernel.launches for kernel in row.kernels):.0f}"
    return (shown_name(row), *(ms_text(parts[part]) for part in Part), launches, median_cells(row.step)[0])


def _token_cells(row: LayerRow) -> tuple[Any, ...]:
    assert row.forward is not None
    reach = median_cells(row.forward)[1]
    floor = ("", "")
    if row.floor_ms:
        floor = (f"{1e3 * row.floor_ms:.1f}", f"{row.forward.median_ms / row.floor_ms:.2f}x")
    return (shown_name(row), f"{1e3 * row.forward.median_ms:.1f}", reach, *floor, _gigabytes(row))


def _gigabytes(row: LayerRow) -> str:
    return f"{row.extra_bytes / 1e9:.3f}"


def _versions(row: LayerRow) -> str:
    return ", ".join(f"{name} {version or 'not installed'}" for name, version in row.versions.items())
