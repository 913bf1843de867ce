"""The table and the figure of a search."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def recipe_of(row: Row) -> str:
    """Say what a variant changes."""
    return ", ".join(f"{name} {said(value)}" for name, value in row["changes"].items()) or "defaults"


def said(value: Any) -> str:
    """Say a value: a curriculum by its ends and how many stages it has, anything else as it is."""
    return f"{value[0]} to {value[-1]} in {len(value)}" if isinstance(value, list) else str(value)


def kinds_of(rows: list[Row]) -> list[list[Row]]:
    """Return rows of one stack and variant together."""
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        changes = json.dumps(row["changes"], sort_keys=True)  # what is said of two curricula may be the same
        kinds.setdefault((row["stack"], changes), []).append(row)
    return list(kinds.values())


def table(rows: list[Row]) -> str:
    """Return the results as Markdown: a line for each variant, a number for each seed."""
    names = (
        "group", "stack", "variant", "steps", "seconds of the stack", "letters and length", "accuracy to 64",
        "accuracy to the end", "right to position",
    )  # fmt: skip
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for kind in kinds_of(rows):
        one = kind[0]
        cells = [
            one["group"],
            one["stack"],
            recipe_of(one),
            f"{max(row['steps'] for row in kind):,}",
            f"{one['seconds']:.0f} for {one['models']}",
            ", ".join(f"{row['stage'][0] or 'all'}:{row['stage'][1]}" for row in kind),
            *(", ".join(f"{100 * list(row['accuracy'].values())[i]:.1f}" for row in kind) for i in (0, -1)),
            ", ".join(str(row["perfect_to"]) for row in kind),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], place: Path) -> None:
    """Draw when each model knew each stage: a panel for each stack, a color for each variant."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is missing (pip install -e '.[examples]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    stacks = list(dict.fromkeys(row["stack"] for row in rows))
    if not stacks:
        return
    columns = min(3, len(stacks))
    lines = -(-len(stacks) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5 * columns, 3.2 * lines), squeeze=False)
    for name, panel in zip(stacks, axes.flat, strict=False):
        for i, kind in enumerate(kinds_of([row for row in rows if row["stack"] == name])):
            for j, row in enumerate(kind):
                steps = [step for *_, step in row["known_at"]]
                label = recipe_of(row) if j == 0 else None
                panel.plot([0, *steps], range(len(steps) + 1), color=f"C{i}", marker=".", linewidth=1, label=label)
        panel.set(title=name, xlabel="step")
        panel.legend(fontsize=7)
    for panel in axes[:, 0]:
        panel.set_ylabel("stages known")
    figure.tight_layout()
    figure.savefig(place, dpi=120)
