"""Print the results of ``m2gen bench`` on workloads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from m2gen.bench.against import Baseline, Comparison
from m2gen.bench.document import Document, Row, besides, dump, row_of, speed_ups
from m2gen.bench.entries import sized
from m2gen.bench.kinds import Call, Kind
from m2gen.bench.side_by_side import Result, Times
from m2gen.cli.show.names import MARK, implementation_names
from m2gen.cli.show.report import Display, print_json
from m2gen.cli.show.table import Table, print_tables
from m2gen.db import Environment, Estimate
from m2gen.errors import ScheduleError, UsageError
from m2gen.schedule import parse
from m2gen.variant import BuiltVariant, layer_names, parse_variant

TIME_COLUMNS = ("kernels", "steps", "forward ms", "95 %", "both ms", "95 %", "speed-up", "extra GB", "host µs")
SCHEDULE_COLUMNS = ("kernels", "schedule", "from")
MORE_COLUMNS = ("variant", "slug")
"""Columns that --verbose adds to schedules."""
LIMIT_COLUMNS = ("kernels", "call", "ms", "µs/step", "floor ms")
BESIDE_COLUMNS = ("kernels", "beside", "time")
AGAINST_COLUMNS = ("kernels", "call", "then ms", "now ms", "change", "noise", "verdict")
WorkloadKey = tuple[str, str, Call, int, int, bool]
"""Layer, variant, call, batch and length of a workload, and whether it is packed."""
CALLS = {"forward": "forward", "forward+backward": "both"}
"""Names of calls in tables, by their names in documents."""
LOOPS = tuple(str(kind) for kind in Kind if kind.most_steps is not None)
"""Names of implementations that are PyTorch loops, which are thousands of times above any floor."""


def run_bench(
    results: Iterable[Sequence[Result]], environment: Environment, display: Display, draw: Callable[[Document], None]
) -> int:
    """Show and draw results, also after an interruption; return 1 if a generated kernel failed."""
    rows: list[Row] = []
    try:
        for found in results:
            rows += map(row_of, found)
    except BaseException:
        if rows:
            with suppress(UsageError):  # the error that ended the run matters more
                _show_and_draw(Document(environment, tuple(rows)), display, draw)
        raise
    _show_and_draw(Document(environment, tuple(rows)), display, draw)
    return 1 if any(row.failure and row.schedule for row in rows) else 0


def _show_and_draw(document: Document, display: Display, draw: Callable[[Document], None]) -> None:
    """Show a run, and draw and keep it also where nothing can be shown, as on a full disk."""
    try:
        show_bench(document, display)
    finally:
        draw(document)


def show_bench(document: Document, display: Display) -> None:
    """Print the times of every implementation, and how close they are to the GPU's limits."""
    if display.as_json:
        print_json(dump(document))
    else:
        print_tables(bench_tables(document, verbose=display.verbose))


def bench_tables(document: Document, *, verbose: bool) -> Iterator[Table]:
    """Yield the tables of a run, whose rows have their workload as heading."""
    names = implementation_names(row.implementation for row in document.rows)
    passed = [pair for pair in zip(document.rows, speed_ups(document.rows), strict=True) if not pair[0].failure]
    times = sections((workload_of(row), _time_cells(row, names[row.implementation], speed)) for row, speed in passed)
    notes = ["both: forward and backward; 95 %: how far the interval that holds the median reaches; L2 cold"]
    notes += ["speed-up: default = 1, by time a step"] if any(speed for _, speed in passed) else []
    yield Table(f"Medians on {document.environment.device}", TIME_COLUMNS, times, notes)
    yield from _beside_tables(document.rows, names)
    if generated := [row for row in document.rows if row.schedule]:
        columns = (*SCHEDULE_COLUMNS, *MORE_COLUMNS) if verbose else SCHEDULE_COLUMNS
        usual = {workload_of(row): row.schedule for row in generated if row.implementation == Kind.DEFAULT}
        cells = (_schedule_cells(row, usual.get(workload_of(row)), verbose=verbose) for row in generated)
        rows = sections(zip(map(workload_of, generated), cells, strict=True))
        yield Table("Schedules", columns, rows)
    if unverified := [row for row, _ in passed if row.unverified]:
        rows = sections((workload_of(row), (names[row.implementation], row.unverified)) for row in unverified)
        yield Table("Timing only: results failed the check", ("kernels", "why"), rows)
    yield from _limit_tables([row for row, _ in passed if row.implementation not in LOOPS], names)
    if failed := [row for row in document.rows if row.failure]:
        rows = sections((workload_of(row), (names[row.implementation], row.failure)) for row in failed)
        yield Table("Failed", ("kernels", "why"), rows)


def workload_of(row: Row) -> WorkloadKey:
    """Return the workload of a row."""
    return (row.layer, row.variant, row.call, row.batch, row.seq, row.packed)


def workload_names(places: Iterable[WorkloadKey]) -> dict[WorkloadKey, str]:
    """Return the names of workloads: layer and dtype, then the size."""
    found = list(dict.fromkeys(places))
    named: dict[tuple[str, str], str] = {}
    for layer in dict.fromkeys(where[0] for where in found):
        keys = dict.fromkeys(where[1] for where in found if where[0] == layer)
        names = layer_names(BuiltVariant(parse_variant(key), (layer,)) for key in keys)
        named |= {(layer, variant.key): name for variant, name in names.items()}
    return {where: f"{named[where[:2]]}, {sized(*where[2:])}" for where in found}


def sections(rows: Iterable[tuple[WorkloadKey, Sequence[Any]]]) -> list[Any]:
    """Return rows with the name of their workload as a heading."""
    placed = list(rows)
    names = workload_names(where for where, _ in placed)
    lines: list[Any] = []
    before = None
    for where, cells in placed:
        lines += [names[where]] if where != before else []
        lines.append(cells)
        before = where
    return lines


def _time_cells(row: Row, name: str, speed: float | None) -> tuple[Any, ...]:
    host = "" if row.host_us is None else f"{row.host_us:.0f}"
    speed_up = "" if speed is None else f"{speed:.3g}x"
    name += MARK if row.unverified else ""
    return (
        name,
        row.steps,
        *median_cells(row.forward),
        *median_cells(row.step),
        speed_up,
        f"{row.extra_bytes / 1e9:.3f}",
        host,
    )


def median_cells(times: Times | Estimate | None) -> tuple[str, str]:
    """Return a median in milliseconds, and how far its interval reaches."""
    if times is None:
        return ("", "")
    reach = max(times.high_ms - times.median_ms, times.median_ms - times.low_ms) / times.median_ms
    return (ms_text(times.median_ms), f"±{reach:.1%}")


def ms_text(value: float) -> str:
    """Return milliseconds with the digits that are significant."""
    return f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"


def _beside_tables(rows: Sequence[Row], names: Mapping[str, str]) -> Iterator[Table]:
    """Yield the table of calls beside others that do the same in another way, if there are any."""
    found = [
        (
            workload_of(row),
            (names[row.implementation], sized(Call(call), row.batch, row.seq, row.packed), f"{ratio:.3f}x"),
        )
        for row, ratios in zip(rows, besides(rows), strict=True)
        for call, ratio in ratios.items()
    ]
    if found:
        note = "time: that of the call, over that of the same kernels on what it is beside; 1.05x takes 5 % longer"
        yield Table("Slots of pools, and drafts", BESIDE_COLUMNS, sections(found), [note])


def _schedule_cells(row: Row, usual: str | None, *, verbose: bool) -> tuple[str, ...]:
    """Return a row's schedule in words, with the knobs that differ from the default ``usual``."""
    cells = (row.implementation, _in_words(row.schedule, usual), row.source)
    return (*cells, row.variant, row.schedule) if verbose else cells


def _in_words(slug: str, usual: str | None) -> str:
    """Say what a schedule is; of a run of an earlier m2gen, by the name that it had then."""
    try:
        return parse(slug).describe(parse(usual) if usual else None)
    except ScheduleError:
        return slug


def _limit_tables(rows: Sequence[Row], names: Mapping[str, str]) -> Iterator[Table]:
    """Yield the table of achieved fractions of the GPU's limits, if these are known."""
    found = [
        (row, call, times)
        for row in rows
        for call, times in (("step" if row.call.decodes else "forward", row.forward), ("both", row.step))
        if times is not None and times.floors_ms
    ]
    if found:
        columns = (*LIMIT_COLUMNS, *map(_short, found[0][2].floors_ms))
        cells = sections(
            (workload_of(row), _limit_cells(row, names[row.implementation], call, t)) for row, call, t in found
        )
        note = "Each limit alone would make the call take that part of its time; floor: the time of the largest"
        yield Table("Achieved parts of the GPU's limits", columns, cells, [note])


def _limit_cells(row: Row, name: str, call: str, times: Times) -> tuple[Any, ...]:
    parts = (f"{part:.0%}" for part in times.parts.values())
    a_step = f"{1e3 * times.median_ms / row.steps:.3f}"
    return (name, call, ms_text(times.median_ms), a_step, ms_text(max(times.floors_ms.values())), *parts)


def _short(limit: str) -> str:
    """Return the first word of a limit's name, as memory of memory traffic."""
    return limit.split()[0]


def run_against(found: Iterable[Comparison], before: Baseline, here: Environment, *, as_json: bool) -> int:
    """Show recorded times beside the new ones, also after an interruption; return 1 if one is slower beyond noise."""
    comparisons: list[Comparison] = []
    try:
        for comparison in found:
            comparisons += [comparison]
    except BaseException:
        if comparisons:
            _show_against(comparisons, before, here, as_json=as_json)
        raise
    _show_against(comparisons, before, here, as_json=as_json)
    return 1 if any(comparison.slower for comparison in comparisons) else 0


def _show_against(comparisons: Sequence[Comparison], before: Baseline, here: Environment, *, as_json: bool) -> None:
    slower = [comparison for comparison in comparisons if comparison.slower]
    if as_json:
        documents = [{**asdict(c), "change": c.change, "slower": c.slower} for c in comparisons]
        print_json({"environment": asdict(here), "recorded_with": before.toolchains, "comparisons": documents})
    else:
        notes = [f"then: {toolchain}" for toolchain in before.toolchains]
        notes += [f"now: torch {here.torch}, triton {here.triton}, driver {here.driver}"]
        rows = sections((_workload(c), _against_cells(c)) for c in comparisons)
        print_tables([Table(f"Recorded times against those of now on {here.device}", AGAINST_COLUMNS, rows, notes)])
    if slower:
        print(f"m2gen: {len(slower)} of {len(comparisons)} times are slower beyond noise", file=sys.stderr)


def _workload(c: Comparison) -> WorkloadKey:
    return (c.layer, c.place.variant, c.place.call, c.place.batch, c.place.seq, c.place.packed)


def _against_cells(c: Comparison) -> tuple[Any, ...]:
    now = "" if c.now is None else ms_text(c.now.median_ms)
    change = "" if c.change is None else f"{c.change:+.1%}"
    verdict = c.failure or ("SLOWER" if c.slower else "faster" if _faster(c) else "same")
    call = "step" if c.place.call.decodes else CALLS[c.place.what]
    return (c.place.implementation, call, ms_text(c.before.median_ms), now, change, f"{c.noise:.1%}", verdict)


def _faster(c: Comparison) -> bool:
    return c.now is not None and c.now.high_ms * (1 + c.noise) < c.before.low_ms
