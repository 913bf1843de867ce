"""Draw bars of implementations side by side: a panel for each quantity, a group of bars for each workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from m2gen.cli.show.figure import Theme, new_figure

HEAD = 0.65
"""Height of the title and the legend above the panels, in inches."""
FOOT = 0.7
"""Height of a panel's title, numbers and label beside its bars, in inches."""
SIDE_BY_SIDE = 2
WORDS = (0.35, 0.56)
"""Width of what is written behind m2gen's bar, as a part of a panel alone and of one of two side by side."""
OFFSET = {"textcoords": "offset points", "va": "center"}


def as_fast(ours: float, other: float) -> str:
    """Return how many times as fast m2gen is."""
    return f"{other / ours:.1f}×"


def as_much(ours: float, other: float) -> str:
    """Return which part of the other's m2gen's is."""
    return f"{ours / other:.0%}"


@dataclass(frozen=True)
class Panel:
    """What the bars of a panel are, and how numbers are written beside them."""

    title: str
    label: str
    unit: str
    form: str
    """How a number is formatted."""
    compare: Callable[[float, float], str]
    """What is said of m2gen's number and another's."""
    words: str
    """What stands behind that."""


FORWARD = Panel("Forward", "milliseconds; shorter is faster", "ms", "#.3g", as_fast, "as fast")
STEP = Panel("Forward and backward", FORWARD.label, "ms", "#.3g", as_fast, "as fast")
MEMORY = Panel("Extra memory of a step", "gigabytes beyond what the call is given", "GB", ".2f", as_much, "as much")


@dataclass(frozen=True)
class Group:
    """The bars of one workload: the number of each panel, or None, by implementation, m2gen's first."""

    name: str
    size: str
    values: dict[str, tuple[float | None, ...]]

    def compared(self, at: int, panel: Panel) -> str:
        """Return what a panel says of m2gen beside the one other implementation; empty if there are several."""
        ours, *others = (values[at] for values in self.values.values())
        if len(others) != 1 or others[0] is None or ours is None:
            return ""
        return f"{panel.compare(ours, others[0])} {panel.words}"


def names_of(groups: Sequence[Group]) -> list[str]:
    """Return the implementations of groups, m2gen's first."""
    return list(dict.fromkeys(name for group in groups for name in group.values))


def bars_figure(groups: Sequence[Group], panels: Sequence[Panel], title: str, theme: Theme) -> Any:
    """Return the figure: up to two panels side by side, a group of bars for each workload, a legend above."""
    names = names_of(groups)
    colors = dict(zip(names, (theme.data[0], *theme.beside), strict=False))
    columns = min(SIDE_BY_SIDE, len(panels))
    rows = -(-len(panels) // columns)
    inches = HEAD + rows * (FOOT + 0.36 * len(groups) * (len(names) + 0.3))
    figure = new_figure(inches)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - HEAD / inches))
    figure.text(0.012, 1 - 0.1 / inches, title, va="top", fontsize=11.5, weight="bold")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for at, panel in enumerate(panels):
        _draw_panel(axes[at], groups, (at, panel), colors, theme)
        labels = [f"{group.name}\n{group.size}" for group in groups] if at % columns == 0 else []
        axes[at].set_yticks(range(len(labels)), labels, color=theme.text)
    where = {"loc": "upper left", "bbox_to_anchor": (0, 1 - 0.33 / inches), "borderaxespad": 0.4}
    legend = figure.legend(*axes[0].get_legend_handles_labels(), ncols=len(names), handlelength=1, **where)
    legend.set_in_layout(False)
    return figure


def _draw_panel(
    axes: Any, groups: Sequence[Group], drawn: tuple[int, Panel], colors: dict[str, str], theme: Theme
) -> None:
    """Draw the bars of one panel, the numbers behind them and what is said of m2gen's."""
    at, panel = drawn
    high = 0.8 / len(colors)
    most = max(value for group in groups for values in group.values.values() if (value := values[at]) is not None)
    longest = max((next(iter(g.values.values()))[at] or 0 for g in groups if g.compared(at, panel)), default=0)
    for number, (name, color) in enumerate(colors.items()):
        having = [(place, g) for place, g in enumerate(groups) if name in g.values and g.values[name][at] is not None]
        y = [place + high * (number - (len(colors) - 1) / 2) for place, _ in having]
        axes.barh(y, [group.values[name][at] for _, group in having], 0.92 * high, color=color, label=name)
        for height, (_, group) in zip(y, having, strict=True):
            written = _write_number(
                axes, (group.values[name][at], height), panel, theme.muted if number else theme.text
            )
            if number == 0:
                said = {"color": theme.data[0], "weight": "bold", "xycoords": written}
                axes.annotate(group.compared(at, panel), (1, 0.5), (6, 0), **said, **OFFSET)
        for place, group in enumerate(groups):
            if group.values.get(name, (0.0,) * (at + 1))[at] is None:
                height = place + high * (number - (len(colors) - 1) / 2)
                axes.annotate("not timed", (0, height), (4, 0), color=theme.muted, **OFFSET)
    axes.set_title(panel.title, loc="left")
    axes.set(xlim=(0, max(1.24 * most, longest / (1 - WORDS[len(axes.figure.axes) > 1]))), xlabel=panel.label)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis="x")


def _write_number(axes: Any, at: tuple[Any, float], panel: Panel, color: str) -> Any:
    number = f"{at[0]:{panel.form}}".removesuffix(".")
    return axes.annotate(f"{number} {panel.unit}", at, (4, 0), color=color, **OFFSET)
