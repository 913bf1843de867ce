"""What is recorded of the runs of learn.py, and their table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asked import Run


def rows_of(runs: list[Run], out: Path, evaluate: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield what is recorded of the runs that are there; ends the program where one is of other settings or words."""
    for run in runs:
        place = out / f"{run.name}.json"
        if place.is_file():
            row = json.loads(place.read_text(encoding="utf-8"))
            if not is_of(row["settings"], run):
                raise SystemExit(f"{place} must be of {run.recipe}'s settings, but is of others; give another --out")
            judged = {name: row[name] for name in evaluate}
            if judged != evaluate:
                asked, got = (f"{on['words']} words of {on['length']}" for on in (evaluate, judged))
                raise SystemExit(f"{place} must be judged on {asked}, but is on {got}; give another --out")
            yield row


def is_of(settings: dict[str, Any], run: Run) -> bool:
    """Say whether a file's settings are a run's; those that came later than the file were as the defaults are."""
    asked = json.loads(json.dumps(run.settings))
    later = {name: asked[name] for name in asked.keys() - settings.keys() - run.changes.keys()}
    return bool(later | settings == asked)


def to_the_end(row: dict[str, Any]) -> str:
    """Say the accuracy to the end of the words, which files of before have not where that is no length they list."""
    part = row["accuracy"].get(str(row["length"]))
    return "" if part is None else f"{100 * part:.2f}"


def table(runs: list[Run], rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: a line for each recipe, a number for each seed."""
    names = (
        "recipe", "what it changes", "group", "heads", "V", "parameters", "steps", "seconds", "letters known",
        "accuracy to the end", "right to position", "perfect seeds",
    )  # fmt: skip
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for recipe in dict.fromkeys(run.recipe for run in runs):
        asked = [run for run in runs if run.recipe == recipe]
        found = [row for row in rows if row["recipe"] == recipe]
        settings = asked[0].settings
        shown = {key: value for key, value in asked[0].changes.items() if key not in ("group", "heads", "columns")}
        letters = [settings["letters"][: len(row["known_at"])] for row in found]
        cells = [
            recipe,
            ", ".join(f"{key} {value}" for key, value in shown.items()) or "nothing",
            *(str(settings[key]) for key in ("group", "heads", "columns")),
            f"{found[0]['parameters']:,}" if found else "",
            ", ".join(f"{row['steps']:,}" for row in found),
            ", ".join(f"{row['seconds']:.0f}" for row in found),
            ", ".join(str(known[-1] or "all") if known else "none" for known in letters),
            ", ".join(to_the_end(row) for row in found),
            ", ".join(str(row["perfect_to"]) for row in found),
            f"{sum(row['perfect_to'] == row['length'] for row in found)} of {len(found)}",
        ]
        if len(found) < len(asked):
            cells[-1] += f" ({len(asked) - len(found)} not run)"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
