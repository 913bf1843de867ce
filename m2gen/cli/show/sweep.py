"""Print ``m2gen bench --sweep``: times along an axis, and the straight lines through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from m2gen.bench.document import CurvePoint, Sweep, SweepDocument, row_of
from m2gen.bench.entries import sized
from m2gen.bench.kinds import Axis
from m2gen.bench.side_by_side import Times
from m2gen.bench.sweep import Fit, fit
from m2gen.cli.show.bench import CALLS, ms_text
from m2gen.cli.show.names import MARK, implementation_names
from m2gen.cli.show.report import Display, print_json
from m2gen.cli.show.table import Table, print_tables
from m2gen.db import Environment
from m2gen.errors import UsageError
from m2gen.pipeline import Swept

X_NAMES = {Axis.SEQ: "S", Axis.ROWS: "K", Axis.BATCH: "B N", Axis.HEADS: "B N"}
FIT_COLUMNS = ("kernels", "call", "intercept ms", "slope ms", "worst deviation", "points", "from")


def sweep_of(swept: Swept) -> Sweep:
    """Return the results of a sweep as documents have them."""
    points = (CurvePoint(point.x, point.fitted, tuple(map(row_of, found))) for point, found in swept.at)
    return Sweep(swept.axis, swept.layer, tuple(points))


@dataclass(frozen=True)
class Curve:
    """The times of one implementation along a sweep, and the line through them."""

    name: str
    implementation: str
    what: str
    """One of the keys of ``CALLS``."""
    x: tuple[int, ...]
    times: tuple[Times, ...]
    line: Fit | None
    fitted_from: int | None
    """The least x that the line is fitted to."""

    @property
    def call(self) -> str:
        return CALLS[self.what]

    def median_at(self, x: int) -> float | None:
        """Return the time at x, or None if there is none."""
        return next((times.median_ms for at, times in zip(self.x, self.times, strict=True) if at == x), None)


def curves(sweep: Sweep) -> list[Curve]:
    """Return the curves of a sweep: each implementation's forward, then its forward and backward."""
    names = implementation_names(row.implementation for point in sweep.points for row in point.rows)
    found = (_curve(sweep, key, name, what) for key, name in names.items() for what in CALLS)
    return [curve for curve in found if curve is not None]


def _curve(sweep: Sweep, implementation: str, name: str, what: str) -> Curve | None:
    own = [(point, row) for point in sweep.points for row in point.rows if row.implementation == implementation]
    name += MARK if any(row.unverified for _, row in own) else ""
    calls = [(point, row.forward if what == "forward" else row.step) for point, row in own]
    timed = [(point, times) for point, times in calls if times is not None]
    if not timed:
        return None
    fitted = [(point.x, times.median_ms) for point, times in timed if point.fitted]
    line = fit([x for x, _ in fitted], [ms for _, ms in fitted])
    xs = tuple(point.x for point, _ in timed)
    every = tuple(times for _, times in timed)
    return Curve(name, implementation, what, xs, every, line, min((x for x, _ in fitted), default=None))


def run_sweeps(
    sweeps: Iterable[Iterable[Swept]], environment: Environment, display: Display, draw: Callable[[SweepDocument], None]
) -> int:
    """Show and draw sweeps and the lines through them, also if one is interrupted.

    Returns the exit status, which is 1 if a generated kernel failed.
    """
    every: list[Swept] = []
    try:
        for growing in sweeps:
            _follow(growing, every, display)
    except BaseException:
        with suppress(UsageError):  # the error that ended the sweeps matters more
            _finish(every, environment, display, draw)
        raise
    document = _finish(every, environment, display, draw)
    rows = [row for sweep in document.sweeps for point in sweep.points for row in point.rows]
    return 1 if any(row.failure and row.schedule for row in rows) else 0


def _follow(growing: Iterable[Swept], every: list[Swept], display: Display) -> None:
    """Add to ``every`` the results of a sweep up to its end or an interruption."""
    before = len(every)
    try:
        for latest in growing:
            every[before:] = [latest]
    finally:
        for swept in every[before:] if not display.as_json else ():
            print_tables(sweep_tables(sweep_of(swept)))
            print()


def _finish(
    every: Sequence[Swept], environment: Environment, display: Display, draw: Callable[[SweepDocument], None]
) -> SweepDocument:
    document = SweepDocument(environment, tuple(map(sweep_of, every)))
    try:
        if display.as_json and every:
            print_json(sweeps_document(document))
    finally:  # also where nothing can be shown, as on a full disk
        if every:
            draw(document)
    return document


def show_sweeps(document: SweepDocument, display: Display) -> None:
    """Print the sweeps of an earlier run."""
    if display.as_json:
        print_json(sweeps_document(document))
    else:
        print_tables(table for sweep in document.sweeps for table in sweep_tables(sweep))


def sweep_tables(sweep: Sweep) -> Iterator[Table]:
    """Yield a table of times for each call, one of failures, and one of the lines through the curves."""
    drawn = curves(sweep)
    x_name, title = X_NAMES[sweep.axis], f"{sweep.layer} over {sweep.axis}"
    for what, call in CALLS.items():
        shown = [curve for curve in drawn if curve.what == what]
        rows = [(p.x, _size(p), *(_cell(curve.median_at(p.x)) for curve in shown)) for p in sweep.points if p.rows]
        if shown:
            yield Table(f"{title}: {call}, ms", (x_name, "size", *(curve.name for curve in shown)), rows)
    failed = [(p.x, row.implementation, row.failure) for p in sweep.points for row in p.rows if row.failure]
    if failed:
        yield Table("Failed", (x_name, "kernels", "why"), failed)
    unverified = [(p.x, row.implementation, row.unverified) for p in sweep.points for row in p.rows if row.unverified]
    if unverified:
        yield Table("Timing only: results failed the check", (x_name, "kernels", "why"), unverified)
    yield Table(f"Lines through {title}", FIT_COLUMNS, list(map(_fit_cells, drawn)))


def _size(point: CurvePoint) -> str:
    row = point.rows[0]
    return sized(row.call, row.batch, row.seq)


def _cell(ms: float | None) -> str:
    return "" if ms is None else ms_text(ms)


def _fit_cells(curve: Curve) -> tuple[Any, ...]:
    if curve.line is None:
        return (curve.name, curve.call, "", "", "", len(curve.x), "")
    line = curve.line
    numbers = (f"{line.intercept_ms:.4f}", f"{line.slope_ms:.3e}", f"{line.worst:.1%}", line.points, curve.fitted_from)
    return (curve.name, curve.call, *numbers)


def sweeps_document(document: SweepDocument) -> dict[str, Any]:
    """Return the document of sweeps as JSON values, with the lines through them."""
    sweeps = [_sweep_document(sweep) for sweep in document.sweeps]
    return {"environment": asdict(document.environment), "sweeps": sweeps}


def _sweep_document(sweep: Sweep) -> dict[str, Any]:
    lines = [
        {"implementation": curve.implementation, "what": curve.what, "from": curve.fitted_from, **asdict(curve.line)}
        for curve in curves(sweep)
        if curve.line
    ]
    return {"axis": str(sweep.axis), "layer": sweep.layer, "points": list(map(asdict, sweep.points)), "lines": lines}
