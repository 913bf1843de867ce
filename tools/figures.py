"""Draw every picture of the README and the site from the measurements in docs/data/: ``python -m tools.figures``.

Each is written to docs/images/ as NAME.svg for light pages and NAME-dark.svg for dark ones, and says in its metadata
which files its numbers are from. Names of pictures draw these alone; ``--check`` writes nothing, and names the pictures
whose files have changed since. What measures each file is said beside its picture in the documents.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2gen.bench.document import Document, read_json, run_of
from m2gen.bench.layers.document import load_layers
from m2gen.cli.show.figure import Plot, Quantity, Style, Theme, new_figure, source_of, write_figure
from m2gen.cli.show.layer_plot import draw_layers
from m2gen.cli.show.plot import draw_sweeps
from m2gen.cli.show.speed import draw_speed
from m2gen.errors import M2genError
from tools.compare_samplers import default_of, recorded

ROOT = Path(__file__).resolve().parents[1]
DATA, IMAGES = ROOT / "docs" / "data", ROOT / "docs" / "images"
SOURCE = re.compile(r"<dc:source>(.*?)</dc:source>")
HEADING = {"x": 0.012, "ha": "left", "fontsize": 11.5, "weight": "bold"}


def bench(plot: Plot) -> None:
    """Draw a run of ``m2gen bench``, as its ``--from`` and ``--plot`` do."""
    (path,) = plot.sources
    layers = load_layers(path)
    if layers is not None:
        draw_layers(layers, plot)
        return
    run = run_of(read_json(path), path)
    if isinstance(run, Document):
        draw_speed(run, plot)
    else:
        draw_sweeps(run, plot)


ORIGINS = {
    "random": "random search",
    "default": "the default and its neighbours",
    "neighbour": "the default and its neighbours",
    "tile": "the default and its neighbours",
    "similar": "from a record",
    "record": "from a record",
    "search": "proposed by TPE",
    "combined": "forward of one trial, backward of another",
}
"""What the legend calls candidates, by how a search came upon them."""
COLOURS = (
    "random search",
    "proposed by TPE",
    "forward of one trial, backward of another",
    "the default and its neighbours",
    "from a record",
)
"""Candidates by the colour that they have: muted first, then those of data."""


def searches(plot: Plot) -> None:
    """Draw the trials of recorded searches, a panel for each journal."""
    title = "Searching a schedule for the 7B layer on an H100: every trial, and the best so far"
    write_figure(plot, title, lambda theme: _searches_figure(plot.sources, title, theme))


def _searches_figure(journals: Sequence[Path], title: str, theme: Theme) -> Any:
    figure = new_figure(4.6)
    figure.suptitle(title, **HEADING)
    panels = figure.subplots(1, len(journals), squeeze=False)[0]
    for axes, journal in zip(panels, journals, strict=True):
        _draw_search(axes, journal, theme)
    labels = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), ncols=3, loc="outside lower left", fontsize="small")
    return figure


def _draw_search(axes: Any, journal: Path, theme: Theme) -> None:
    """Draw a random search and the search by TPE that follows it in one journal."""
    trials = recorded(journal)
    begin = next((i for i, trial in enumerate(trials) if trial.origin == "neighbour"), 0)
    origins = ["random" if i < begin and t.origin == "search" else t.origin for i, t in enumerate(trials)]
    for colour, label in zip((theme.muted, *theme.data), COLOURS, strict=False):
        passed = [
            (i + 1, trials[i].median_ms) for i, o in enumerate(origins) if ORIGINS[o] == label and trials[i].median_ms
        ]
        axes.plot([i for i, _ in passed], [ms for _, ms in passed], "o", color=colour, markersize=3, label=label)
    best, steps = float("inf"), []
    for trial in trials:
        best = min(best, trial.median_ms or best)
        steps.append(best)
    axes.plot(
        range(1, len(steps) + 1), steps, color=theme.text, linewidth=1.5, drawstyle="steps-post", label="best so far"
    )
    start = default_of(trials)
    default = next(trial.median_ms for trial in trials if trial.schedule == start)
    axes.axhline(default, color=theme.muted, linestyle=":", linewidth=1, label="the default schedule")
    size = re.search(r"_b(\d+)_s(\d+)", journal.name)
    assert size is not None
    heading = f"{size[1]} × {size[2]} tokens: from {default:.2f} to {best:.2f} ms"
    axes.set(yscale="log", xlabel="trials", ylabel="milliseconds, forward and backward", title=heading)
    ticks = [ms for ms in (5, 10, 20, 50, 100) if best / 1.5 < ms < 1.2 * max(t.median_ms or 0 for t in trials)]
    axes.set_yticks(ticks, [str(ms) for ms in ticks])
    axes.minorticks_off()
    axes.grid(axis="y")


MIXERS = {"m2rnn": "M²RNN", "gru": "GRU", "linear": "linear recurrence", "attention": "attention"}
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def state_tracking(plot: Plot) -> None:
    """Draw to which position every run of the example of state tracking is right, a panel for each group."""
    (path,) = plot.sources
    found = json.loads(path.read_text(encoding="utf-8"))
    title = f"State tracking: trained on words of {found['seen']}, tested on {found['asked']}; one dot a seed"
    write_figure(plot, title, lambda theme: _groups_figure(found, title, theme))


def _groups_figure(found: dict[str, Any], title: str, theme: Theme) -> Any:
    groups = list(dict.fromkeys(run["group"] for run in found["runs"]))
    figure = new_figure(2.7)
    figure.suptitle(title, **HEADING)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    kinds = [kind for kind in MIXERS if any(run["model"] == kind for run in found["runs"])]
    for axes, group in zip(panels, groups, strict=True):
        for place, kind in enumerate(kinds):
            right = [run["right_to"] for run in found["runs"] if (run["group"], run["model"]) == (group, kind)]
            colour = theme.data[0] if kind == "m2rnn" else theme.muted
            if right:  # a run whose budget was over has none of some
                axes.hlines(place, 1, max(right), color=colour, linewidth=2, alpha=0.4)
            for position, runs in Counter(right).items():
                axes.plot([position], [place], "o", color=colour, markersize=6)
                if runs > 1:
                    axes.annotate(f"{runs}×", (position, place), (0, 7), textcoords="offset points", ha="center")
        axes.axvline(found["seen"], color=theme.muted, linestyle=":", linewidth=1)
        axes.set(
            xscale="log",
            xlim=(0.7, 1.9 * found["asked"]),
            title=group.translate(SUBSCRIPTS),
            xlabel="every answer right up to position",
        )
        axes.set_xticks([1, 10, found["seen"], found["asked"]], ["1", "10", str(found["seen"]), str(found["asked"])])
        axes.minorticks_off()
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
    panels[0].set_yticks(range(len(kinds)), [MIXERS[kind] for kind in kinds], color=theme.text)
    panels[0].set_ylim(len(kinds) - 0.5, -0.6)
    return figure


@dataclass(frozen=True)
class Picture:
    """The files that a picture's numbers are from, and what draws it."""

    data: tuple[str, ...]
    draw: Callable[[Plot], None] = bench
    quantity: Quantity = Quantity.TIME

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files in docs/data/."""
        return tuple(DATA / name for name in self.data)


PICTURES = {
    "speed": Picture(("speed_h200.json",)),
    "memory": Picture(("speed_h200.json",), quantity=Quantity.MEMORY),
    "layers": Picture(("layers_h200.json",)),
    "layers_published": Picture(("layers_published_h200.json",)),
    "cost": Picture(("cost_h200.json",)),
    "search": Picture(("h100_m2rnn_7b_b4_s4096.jsonl.gz", "h100_m2rnn_7b_b1_s16384.jsonl.gz"), searches),
    "state_tracking": Picture(("state_tracking_h200.json",), state_tracking),
}


def place(name: str, style: Style, folder: Path = IMAGES) -> Path:
    """Return where a picture is written."""
    return folder / f"{name}{'-dark' if style is Style.DARK else ''}.svg"


def drawn(name: str, folder: Path = IMAGES) -> list[Path]:
    """Draw a picture in each style, and return the files."""
    picture = PICTURES[name]
    plots = [Plot(place(name, style, folder), style, picture.quantity, picture.sources) for style in Style]
    for plot in plots:
        picture.draw(plot)
    return [plot.path for plot in plots]


def outdated(folder: Path = IMAGES) -> list[str]:
    """Return the pictures that are missing, or that were drawn from other contents of their files."""
    wrong = []
    for name, picture in PICTURES.items():
        for path in (place(name, style, folder) for style in Style):
            said = SOURCE.search(path.read_text(encoding="utf-8")) if path.is_file() else None
            if said is None or said[1] != source_of(picture.sources):
                wrong.append(path.name)
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all if none is given: {', '.join(PICTURES)}")
    parser.add_argument("--check", action="store_true", help="exit 1 if a picture is not of the files as they are")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    given = parser.parse_args(arguments)
    if unknown := sorted({*given.names} - {*PICTURES}):
        parser.error(f"NAME must be among {', '.join(PICTURES)}, got {', '.join(unknown)}")
    if given.check:
        wrong = outdated(given.out)
        print(
            "\n".join(f"{name} must be drawn anew: python -m tools.figures" for name in wrong),
            end="\n" if wrong else "",
        )
        return 1 if wrong else 0
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names or PICTURES:
        print("\n".join(str(path) for path in drawn(name, given.out)))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except M2genError as error:
        raise SystemExit(f"figures: {error}") from None
