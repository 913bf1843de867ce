"""Sweeps as curves with the lines through them, drawn by matplotlib where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2gen.bench.kinds import Axis
from m2gen.bench.side_by_side import Result
from m2gen.bench.sweep import Fit, fit
from m2gen.errors import UsageError
from m2gen.pipeline import Swept

LABELS = {
    Axis.SEQ: "sequence length S",
    Axis.BATCH: "heads of all sequences B N, by the batch",
    Axis.HEADS: "heads of all sequences B N, by the heads",
    Axis.ROWS: "rows of the state K",
}


@dataclass(frozen=True)
class Curve:
    """The times of one implementation along a sweep, and the line through those that it has to fit."""

    contender: str
    what: str
    x: tuple[int, ...]
    median_ms: tuple[float, ...]
    low_ms: tuple[float, ...]
    high_ms: tuple[float, ...]
    floor_ms: tuple[float, ...]
    """The largest floor at each x; empty on a GPU whose limits are not known."""
    line: Fit | None
    fitted_from: int | None
    """The least x that the line goes through."""

    def median_at(self, x: int) -> float | None:
        """Return the time at x; None where the implementation failed there."""
        return dict(zip(self.x, self.median_ms, strict=True)).get(x)


def require() -> None:
    """Raise UsageError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot must have matplotlib to draw with, got none: pip install 'm2gen[plot]'")


def curves(swept: Swept) -> list[Curve]:
    """Return the curves of a sweep: each implementation's forward, then its forward and backward."""
    names = dict.fromkeys(result.entry.implementation.name for _, found in swept.at for result in found)
    pairs = [(name, what) for name in names for what in ("forward", "forward+backward")]
    return [curve for name, what in pairs if (curve := _curve(swept, name, what)) is not None]


def _curve(swept: Swept, name: str, what: str) -> Curve | None:
    timed = [
        (point, timing)
        for point, found in swept.at
        for result in found
        if result.entry.implementation.name == name and (timing := _timing(result, what)) is not None
    ]
    if not timed:
        return None
    fitted = [(point.x, timing.estimate.median_ms) for point, timing in timed if point.fitted]
    estimates = [timing.estimate for _, timing in timed]
    return Curve(
        name,
        what,
        tuple(point.x for point, _ in timed),
        tuple(estimate.median_ms for estimate in estimates),
        tuple(estimate.low_ms for estimate in estimates),
        tuple(estimate.high_ms for estimate in estimates),
        tuple(max(timing.floors_ms.values()) for _, timing in timed if timing.floors_ms),
        fit([x for x, _ in fitted], [ms for _, ms in fitted]),
        min((x for x, _ in fitted), default=None),
    )


def _timing(result: Result, what: str) -> Any:
    return result.forward if what == "forward" else result.step


def draw(sweeps: Sequence[Swept], device: str, path: Path) -> None:
    """Draw sweeps side by side, both scales logarithmic: medians with intervals, lines, and the largest floor."""
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(sweeps), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, swept in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps, strict=True):
        for index, curve in enumerate(curves(swept)):
            _draw_curve(axes, curve, f"C{index}")
        axes.set(xscale="log", yscale="log", xlabel=LABELS[swept.axis], ylabel="ms", title=f"{swept.layer}, {device}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path)


def _draw_curve(axes: Any, curve: Curve, color: str) -> None:
    below = [middle - low for middle, low in zip(curve.median_ms, curve.low_ms, strict=True)]
    above = [high - middle for middle, high in zip(curve.median_ms, curve.high_ms, strict=True)]
    label = f"{curve.contender}, {curve.what}"
    axes.errorbar(curve.x, curve.median_ms, (below, above), fmt="o", color=color, markersize=4, label=label)
    if curve.line is not None and curve.fitted_from is not None:
        x = [value for value in curve.x if value >= curve.fitted_from]
        text = f"line, off by at most {curve.line.worst:.1%}"
        axes.plot(x, [curve.line.at(value) for value in x], color=color, linewidth=1, label=text)
    if curve.floor_ms:
        axes.plot(curve.x, curve.floor_ms, color=color, linestyle=":", label=f"floor, {curve.what}")
