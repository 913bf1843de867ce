"""Draw a run: the time of calls with m2gen's kernels beside other implementations."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2gen.bench.document import Document, Row
from m2gen.bench.kinds import Call, Kind
from m2gen.bench.side_by_side import Times
from m2gen.cli.show.bench import WorkloadKey, workload_names, workload_of
from m2gen.cli.show.figure import THEMES, Style, Theme, new_figure, write_figure
from m2gen.cli.show.names import implementation_names
from m2gen.errors import UsageError

OURS = "m2gen, tuned"
CALLS = ("Forward", "Forward and backward")
HEAD = 0.65
"""Height of the title and the legend above the panels, in inches."""
NEEDED = (
    "--plot must have times of m2gen's kernels beside those of another implementation: of --peer, or of the default "
    "schedule beside a tuned one"
)


@dataclass(frozen=True)
class Group:
    """The bars of one workload: milliseconds of forward, and of forward and backward, by implementation."""

    name: str
    size: str
    ms: dict[str, tuple[float, float]]
    """Milliseconds by implementation, m2gen's first."""

    def factors(self, call: int) -> dict[str, float]:
        """Return the speed-up of m2gen over each other implementation."""
        ours = self.ms[OURS][call]
        return {name: ms[call] / ours for name, ms in self.ms.items() if name != OURS}


def speed_groups(document: Document) -> list[Group]:
    """Return a group for every workload with times of m2gen and another implementation.

    m2gen's kernels are the tuned ones, or the default ones if tuning has no others; they are compared with peers, or
    without peers with the default. Raises UsageError if there is no such workload, and names on standard error those
    that are left out.
    """
    timed: dict[WorkloadKey, dict[str, Row]] = {}
    for row in document.rows:
        if row.call is Call.SEQUENCE:
            having = timed.setdefault(workload_of(row), {})
            having |= {} if row.failure or row.step is None or row.forward is None else {row.implementation: row}
    peers = dict.fromkeys(name for rows in timed.values() for name in rows if name not in set(Kind))
    labels = {name: f"{short} kernel" for name, short in implementation_names(peers).items()}
    labels = labels or {str(Kind.DEFAULT): "m2gen, default schedule"}
    names = workload_names(timed)
    groups = {where: _group(names[where], rows, labels) for where, rows in timed.items()}
    drawn = [group for group in groups.values() if group is not None]
    if not drawn:
        raise UsageError(f"{NEEDED}, got none")
    left_out = [names[where] for where, group in groups.items() if group is None]
    if left_out:
        print(f"m2gen: not drawn, since there is no time to compare: {'; '.join(left_out)}", file=sys.stderr)
    return drawn


def _group(name: str, rows: dict[str, Row], labels: dict[str, str]) -> Group | None:
    ours = rows.get(Kind.TUNED) or (rows.get(Kind.DEFAULT) if str(Kind.DEFAULT) not in labels else None)
    others = {label: rows[implementation] for implementation, label in labels.items() if implementation in rows}
    if ours is None or not others:
        return None
    ms = {label: (_ms(row.forward), _ms(row.step)) for label, row in {OURS: ours, **others}.items()}
    layer, _, _ = name.rpartition(", ")
    return Group(layer, _size(ours), ms)


def _size(row: Row) -> str:
    return f"{row.batch} × 1 to {row.seq} tokens" if row.packed else f"{row.batch} × {row.seq} tokens"


def _ms(times: Times | None) -> float:
    assert times is not None
    return times.median_ms


def check_comparable(kinds: Sequence[Kind], peers: Iterable[str]) -> None:
    """Raise UsageError if the implementations to time include nothing to compare."""
    asked = set(kinds)
    if not ((Kind.PEER in asked and any(True for _ in peers)) or {Kind.DEFAULT, Kind.TUNED} <= asked):
        raise UsageError(f"{NEEDED}, got {', '.join(kinds)}")


def speed_title(document: Document, groups: Sequence[Group]) -> str:
    """Return the title of the picture."""
    others = list(dict.fromkeys(name for group in groups for name in group.ms if name != OURS))
    beside = f"the {others[0]}" if len(others) == 1 else "other implementations"
    return f"Time of one call on an {document.environment.device}: m2gen's kernels beside {beside}"


def draw_speed(document: Document, path: Path, style: Style) -> None:
    """Draw a run's workloads into a file: bars of milliseconds, with m2gen's speed-up over each other one."""
    groups = speed_groups(document)
    title, theme = speed_title(document, groups), THEMES[style]
    write_figure(path, theme, title, lambda: speed_figure(groups, title, theme))


def speed_figure(groups: Sequence[Group], title: str, theme: Theme) -> Any:
    """Return the figure: forward on the left, forward and backward on the right, a group of bars for each workload."""
    names = list(dict.fromkeys(name for group in groups for name in group.ms))
    colors = dict(zip(names, (theme.data[0], *theme.beside), strict=False))
    inches = 1.35 + 0.36 * len(groups) * (len(names) + 0.3)
    figure = new_figure(inches)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - HEAD / inches))
    figure.text(0.012, 1 - 0.1 / inches, title, va="top", fontsize=11.5, weight="bold")
    both = figure.subplots(1, len(CALLS))
    for call, axes in enumerate(both):
        _draw_call(axes, groups, call, colors, theme)
    both[0].set_yticks(range(len(groups)), [f"{group.name}\n{group.size}" for group in groups], color=theme.text)
    both[1].set_yticks([])
    where = {"loc": "upper left", "bbox_to_anchor": (0, 1 - 0.33 / inches), "borderaxespad": 0.4}
    legend = figure.legend(*both[0].get_legend_handles_labels(), ncols=len(names), handlelength=1, **where)
    legend.set_in_layout(False)
    return figure


def _draw_call(axes: Any, groups: Sequence[Group], call: int, colors: dict[str, str], theme: Theme) -> None:
    """Draw the bars of one call, the times behind them and m2gen's factors."""
    high = 0.8 / len(colors)
    most = max(ms[call] for group in groups for ms in group.ms.values())
    for number, (name, color) in enumerate(colors.items()):
        having = [(place, group) for place, group in enumerate(groups) if name in group.ms]
        y = [place + high * (number - (len(colors) - 1) / 2) for place, _ in having]
        axes.barh(y, [group.ms[name][call] for _, group in having], 0.92 * high, color=color, label=name)
        for at, (_, group) in zip(y, having, strict=True):
            _write_time(axes, at, group, name, call, theme)
    axes.set_title(CALLS[call], loc="left")
    axes.set(xlim=(0, 1.24 * most), xlabel="milliseconds; shorter is faster")
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis="x")


def _write_time(axes: Any, y: float, group: Group, name: str, call: int, theme: Theme) -> None:
    ours = name == OURS
    ms = group.ms[name][call]
    offset = {"textcoords": "offset points", "va": "center"}
    written = axes.annotate(f"{ms:#.3g} ms", (ms, y), (4, 0), color=theme.text if ours else theme.muted, **offset)
    factors = group.factors(call).values()
    if ours:
        text = ", ".join(f"{factor:.1f}×" for factor in factors) + " as fast"
        axes.annotate(text, (1, 0.5), (6, 0), xycoords=written, color=theme.data[0], weight="bold", **offset)
