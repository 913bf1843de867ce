"""Draw sweeps: times along an axis, and the lines through them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2gen.bench.document import Sweep, SweepDocument
from m2gen.bench.kinds import Axis
from m2gen.cli.show.figure import THEMES, Style, Theme, new_figure, write_figure
from m2gen.cli.show.sweep import Curve, curves

LABELS = {
    Axis.SEQ: "steps S",
    Axis.BATCH: "heads of all sequences, B N, by the batch",
    Axis.HEADS: "heads of all sequences, B N, by the heads",
    Axis.ROWS: "rows of the state, K",
}


def draw_sweeps(document: SweepDocument, path: Path, style: Style) -> None:
    """Draw sweeps side by side into a file."""
    theme = THEMES[style]
    device = document.environment.device
    title = f"How the time of a call grows on an {device}"
    write_figure(path, theme, title, lambda: sweeps_figure(document.sweeps, device, theme))


def sweeps_figure(sweeps: Sequence[Sweep], device: str, theme: Theme) -> Any:
    """Return the figure, with logarithmic scales: medians with intervals, lines, and the largest floor."""
    figure = new_figure(4.8, 0.75 * len(sweeps))
    for axes, sweep in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps, strict=True):
        for number, curve in enumerate(curves(sweep)):
            _draw_curve(axes, curve, theme.data[number % len(theme.data)])
        labels = {"xlabel": LABELS[sweep.axis], "ylabel": "milliseconds", "title": f"{sweep.layer}, {device}"}
        axes.set(xscale="log", yscale="log", **labels)
        axes.grid()
        axes.legend(fontsize="small")
    return figure


def _draw_curve(axes: Any, curve: Curve, color: str) -> None:
    below = [times.median_ms - times.low_ms for times in curve.times]
    above = [times.high_ms - times.median_ms for times in curve.times]
    medians = [times.median_ms for times in curve.times]
    label = f"{curve.name}, {curve.what}"
    axes.errorbar(curve.x, medians, (below, above), fmt="o", color=color, markersize=4, label=label)
    if curve.line is not None and curve.fitted_from is not None:
        x = [value for value in curve.x if value >= curve.fitted_from]
        text = f"line, off by at most {curve.line.worst:.1%}"
        axes.plot(x, [curve.line.at(value) for value in x], color=color, linewidth=1, label=text)
    floors = [max(times.floors_ms.values()) for times in curve.times if times.floors_ms]
    if floors:
        axes.plot(curve.x, floors, color=color, linestyle=":", label=f"floor, {curve.what}")
