"""Draw sweeps: times along an axis, and the lines through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m2gen.bench.document import Sweep, SweepDocument
from m2gen.bench.kinds import Axis
from m2gen.cli.show.figure import Plot, Quantity, Theme, new_figure, write_figure
from m2gen.cli.show.sweep import Curve, curves
from m2gen.errors import UsageError

LABELS = {
    Axis.SEQ: "steps S",
    Axis.BATCH: "heads of all sequences (B × N), in larger batches",
    Axis.HEADS: "heads of all sequences (B × N), more of each",
    Axis.ROWS: "rows of the state, K",
}


HIGH = 3.7
"""Height of a panel, in inches."""


def draw_sweeps(document: SweepDocument, plot: Plot) -> None:
    """Draw sweeps into a file, two side by side; raises UsageError if none has a time."""
    if plot.quantity is not Quantity.TIME:
        raise UsageError(f"--quantity must be time for sweeps, got {plot.quantity}")
    if not any(map(curves, document.sweeps)):
        raise UsageError("--plot must have times along an axis, got none")
    title = f"How the time of a call grows on an {document.environment.device}"
    write_figure(plot, title, lambda theme: sweeps_figure(document.sweeps, title, theme))


def sweeps_figure(sweeps: Sequence[Sweep], title: str, theme: Theme) -> Any:
    """Return the figure, with logarithmic scales: medians with intervals, lines, and the largest floor."""
    columns = min(2, len(sweeps))
    rows = -(-len(sweeps) // columns)
    figure = new_figure(0.4 + HIGH * rows, 1.0 if columns == 2 else 0.75)
    figure.suptitle(title, x=0.012, ha="left", fontsize=11.5, weight="bold")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, sweep in zip(panels, sweeps, strict=False):
        drawn = curves(sweep)
        for number, curve in enumerate(drawn):
            _draw_curve(axes, curve, theme.data[number % len(theme.data)])
        axes.set(xscale="log", yscale="log", xlabel=LABELS[sweep.axis], ylabel="milliseconds", title=_heading(sweep))
        axes.set_xticks(*_ticks(sweep))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid()
        if drawn:
            axes.legend(fontsize="small")
    for axes in panels[len(sweeps) :]:
        axes.set_axis_off()
    return figure


def _heading(sweep: Sweep) -> str:
    """Return a panel's title: the layer, and what of a call's size stays the same along the axis."""
    rows = [row for point in sweep.points for row in point.rows]
    batches, lengths = {row.batch for row in rows}, {row.seq for row in rows}
    same = [f"{name}{of}" for name, every in (("B", batches), ("S", lengths)) if len(every) == 1 for of in every]
    return ", ".join([sweep.layer, *same])


def _ticks(sweep: Sweep) -> tuple[list[int], list[str]]:
    """Return the places of the axis, at most every second one of many, and their names."""
    places = sorted({point.x for point in sweep.points})
    places = places[:: 2 if len(places) > 6 else 1]
    return places, [f"{x:,}" for x in places]


def _draw_curve(axes: Any, curve: Curve, color: str) -> None:
    below = [times.median_ms - times.low_ms for times in curve.times]
    above = [times.high_ms - times.median_ms for times in curve.times]
    medians = [times.median_ms for times in curve.times]
    label = f"{curve.name}, {curve.what}"
    if curve.line is not None and curve.fitted_from is not None:
        x = [value for value in curve.x if value >= curve.fitted_from]
        axes.plot(x, [curve.line.at(value) for value in x], color=color, linewidth=1)
        label += f"; fit within {curve.line.worst:.1%}"
    axes.errorbar(curve.x, medians, (below, above), fmt="o", color=color, markersize=4, label=label)
    floors = [max(times.floors_ms.values()) for times in curve.times if times.floors_ms]
    if len(floors) == len(curve.x):
        axes.plot(curve.x, floors, color=color, linestyle=":", label=f"floor, {curve.what}")
