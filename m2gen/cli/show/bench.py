"""What ``m2gen bench`` prints, and its exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from m2gen.bench.against import Baseline, Comparison
from m2gen.bench.book import Book, Row, Times, dump, row_of, speed_ups
from m2gen.bench.contest import sized
from m2gen.bench.measure import Result
from m2gen.bench.words import Kind
from m2gen.cli.show.plot import Curve, curves, draw
from m2gen.cli.show.report import print_json
from m2gen.cli.show.table import Table, print_tables
from m2gen.errors import UsageError
from m2gen.pipeline import Stand, Swept
from m2gen.variant import parse_variant

TIME_COLUMNS = (
    "layer",
    "dtype",
    "workload",
    "contender",
    "steps",
    "forward ms",
    "95 %",
    "forward+backward ms",
    "95 %",
    "speed-up",
    "extra GB",
    "host µs",
    "schedule",
    "from",
    "failed",
)
AGAINST_COLUMNS = ("layer", "dtype", "workload", "contender", "what", "then ms", "now ms", "change", "noise", "verdict")
LOOPS = tuple(str(kind) for kind in Kind if kind.most_steps is not None)
"""Contenders that are loops of PyTorch, thousands of times off any floor."""


def run_bench(results: Iterable[Sequence[Result]], stand: Stand, *, as_json: bool) -> int:
    """Show what was timed, also where it is interrupted; return 1 if a generated kernel failed."""
    rows: list[Row] = []
    try:
        for found in results:
            rows += map(row_of, found)
    finally:
        if rows:
            show_bench(Book(stand.environment, tuple(rows)), as_json=as_json)
    return 1 if any(row.failure and row.schedule for row in rows) else 0


def show_bench(book: Book, *, as_json: bool) -> None:
    """Print the times of every contender, and how near they are to the GPU's limits."""
    if as_json:
        print_json(dump(book))
        return
    speeds = speed_ups(book.rows)
    title = f"Medians on {book.environment.device}, L2 cold, graphs; speed-up: default = 1, by time a step"
    print_tables(
        [Table(title, TIME_COLUMNS, [_time_cells(row, speed) for row, speed in zip(book.rows, speeds, strict=True)])]
    )
    limits = [
        (row, what, times)
        for row in book.rows
        if row.contender not in LOOPS
        for what, times in (("forward", row.forward), ("forward+backward", row.step))
        if times is not None and times.floors_ms
    ]
    if limits:
        names = list(limits[0][2].floors_ms)
        columns = ("layer", "dtype", "workload", "contender", "what", "ms", "µs/step", "floor ms", *names)
        print_tables([Table("Achieved parts of the GPU's limits", columns, [_limit_cells(*limit) for limit in limits])])


def _where(row: Row) -> tuple[str, str, str]:
    return (row.layer, _dtype(row.variant), sized(row.call, row.batch, row.seq))


def _dtype(variant: str) -> str:
    return str(parse_variant(variant).dtype)


def _time_cells(row: Row, speed: float | None) -> tuple[Any, ...]:
    memory = "" if row.failure else f"{row.extra_bytes / 1e9:.3f}"
    host = "" if row.host_us is None else f"{row.host_us:.0f}"
    times = (*_interval(row.forward), *_interval(row.step), "" if speed is None else f"{speed:.3g}x")
    return (*_where(row), row.contender, row.steps, *times, memory, host, row.schedule, row.source, row.failure)


def _interval(times: Times | None) -> tuple[str, str]:
    return ("", "") if times is None else (_ms(times.median_ms), f"{_ms(times.low_ms)} to {_ms(times.high_ms)}")


def _ms(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"


def _limit_cells(row: Row, what: str, times: Times) -> tuple[Any, ...]:
    what = "step" if row.call.decodes else what
    parts = [f"{part:.0%}" for part in times.parts.values()]
    a_step = f"{1e3 * times.median_ms / row.steps:.3f}"
    floor = _ms(max(times.floors_ms.values()))
    return (*_where(row), row.contender, what, _ms(times.median_ms), a_step, floor, *parts)


def run_against(found: Iterable[Comparison], before: Baseline, stand: Stand, *, as_json: bool) -> int:
    """Show every recorded time beside that of now; return 1 if one is slower beyond noise."""
    comparisons = list(found)
    here = stand.environment
    slower = [comparison for comparison in comparisons if comparison.slower]
    if as_json:
        rows = [{**asdict(c), "change": c.change, "slower": c.slower} for c in comparisons]
        print_json({"environment": asdict(here), "recorded_with": before.toolchains, "comparisons": rows})
    else:
        now = f"torch {here.torch}, triton {here.triton}, driver {here.driver}"
        title = f"Recorded ({'; '.join(before.toolchains)}) against now ({now}) on {here.device}"
        print_tables([Table(title, AGAINST_COLUMNS, list(map(_against_cells, comparisons)))])
    if slower:
        print(f"m2gen: {len(slower)} of {len(comparisons)} times are slower beyond noise", file=sys.stderr)
    return 1 if slower else 0


def _against_cells(c: Comparison) -> tuple[Any, ...]:
    place = c.place
    where = (c.layer, _dtype(place.variant), sized(place.call, place.batch, place.seq), place.contender, place.what)
    now = "" if c.now is None else _ms(c.now.median_ms)
    change = "" if c.change is None else f"{c.change:+.1%}"
    verdict = c.failure or ("SLOWER" if c.slower else "faster" if _faster(c) else "same")
    return (*where, _ms(c.before.median_ms), now, change, f"{c.noise:.1%}", verdict)


def _faster(c: Comparison) -> bool:
    return c.now is not None and c.now.high_ms * (1 + c.noise) < c.before.low_ms


def run_sweeps(sweeps: Iterable[Iterable[Swept]], stand: Stand, plot: Path | None, *, as_json: bool) -> int:
    """Show each sweep and the lines through it, and draw them, also where one is interrupted.

    Returns 1 if a generated kernel failed.
    """
    every: list[Swept] = []
    try:
        for growing in sweeps:
            _follow(growing, every, show=not as_json)
    except BaseException:
        with suppress(UsageError):  # what ended the sweeps is said, rather than that they cannot be drawn
            _finish(every, stand, plot, as_json=as_json)
        raise
    _finish(every, stand, plot, as_json=as_json)
    results = [result for each in every for _, found in each.at for result in found]
    return 1 if any(result.failure and result.entry.contender.kind.generated for result in results) else 0


def _follow(growing: Iterable[Swept], every: list[Swept], *, show: bool) -> None:
    """Add to ``every`` what a sweep came to before it ended or was interrupted."""
    before = len(every)
    try:
        for latest in growing:
            every[before:] = [latest]
    finally:
        for swept in every[before:] if show else ():
            show_sweep(swept)


def _finish(every: Sequence[Swept], stand: Stand, plot: Path | None, *, as_json: bool) -> None:
    if as_json and every:
        print_json({"environment": asdict(stand.environment), "sweeps": [_sweep_json(each) for each in every]})
    if plot is None or not every:
        return
    try:
        draw(every, stand.environment.device, plot)
    except OSError as error:
        raise UsageError(f"--plot {plot} must be writable: {error.strerror or error}") from error


def show_sweep(swept: Swept) -> None:
    """Print the times along an axis, and the line through each contender's."""
    drawn = curves(swept)
    names = [f"{curve.contender} {curve.what} ms" for curve in drawn]
    rows = [
        (
            point.x,
            sized(point.workload.call, point.workload.batch, point.workload.seq),
            *("" if (ms := curve.median_at(point.x)) is None else _ms(ms) for curve in drawn),
        )
        for point, _ in swept.at
    ]
    print_tables([Table(f"{swept.layer} over {swept.axis}", (_x_name(swept), "workload", *names), rows)])
    failures = [
        (point.x, result.entry.contender.name, f"{result.failure.reason}: {result.failure.message}")
        for point, found in swept.at
        for result in found
        if result.failure
    ]
    if failures:
        print_tables([Table("Failed", (_x_name(swept), "contender", "why"), failures)])
    columns = ("contender", "what", "intercept ms", "slope ms", "worst deviation", "points", "from")
    print_tables(
        [Table(f"Lines through {swept.layer} over {swept.axis}", columns, [_fit_cells(curve) for curve in drawn])]
    )


def _x_name(swept: Swept) -> str:
    return {"seq": "S", "rows": "K"}.get(str(swept.axis), "B N")


def _fit_cells(curve: Curve) -> tuple[Any, ...]:
    if curve.line is None:
        return (curve.contender, curve.what, "", "", "", len(curve.x), "")
    line = curve.line
    numbers = (f"{line.intercept_ms:.4f}", f"{line.slope_ms:.3e}", f"{line.worst:.1%}", line.points, curve.fitted_from)
    return (curve.contender, curve.what, *numbers)


def _sweep_json(swept: Swept) -> dict[str, Any]:
    lines = [
        {"contender": curve.contender, "what": curve.what, "from": curve.fitted_from, **asdict(curve.line)}
        for curve in curves(swept)
        if curve.line
    ]
    at = [{"x": p.x, "fitted": p.fitted, "rows": [asdict(row_of(result)) for result in found]} for p, found in swept.at]
    return {"axis": str(swept.axis), "layer": swept.layer, "points": at, "lines": lines}
