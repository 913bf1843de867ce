"""Tables and figures of finished runs: right answers by length, for each task and model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from files import around, write_text
from outcomes import Results
from pictures import light_and_dark, picture
from train import Config

COLOURS = {"m2rnn": "#e7298a", "gated_deltanet": "#1b9e77", "window": "#e6ab02", "attention": "#7f7f7f"}
"""Colours of models, which are those of the hybrids' figures where these have a model."""
MARKERS = {"m2rnn": "o", "gated_deltanet": "s", "window": "v", "attention": "^"}
WIDTHS = {"m2rnn": 0.9, "gated_deltanet": 1.6, "window": 0.9, "attention": 2.3}
"""Lines that lie on each other are told apart by their widths: the narrowest is drawn last."""
SAID = "right answers by length, a line for each run, for recall and copy"
"""What the figure shows, for who does not see it."""


def name_of(config: Config, kind: str) -> str:
    """Return a model's name in tables and figures."""
    window = f"attention to a window of {config.window}"
    return {"m2rnn": "M²RNN", "gated_deltanet": "Gated DeltaNet", "window": window}.get(kind, kind)


def span(values: Sequence[float], digits: int) -> str:
    """Write the lowest and the highest value, or one where they are written alike."""
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def by_chance(config: Config) -> float:
    """Return the share of right answers of who knows a word's values, and not which answers which question.

    The place is the right one, or another with the same value.
    """
    place = 1 / config.items
    return place + (1 - place) / config.values


def table(results: Results) -> str:
    """Return the results as Markdown: models, then for each task the lowest and the highest share by length."""
    config, machine = results.config, results.machine
    lines = [
        f"{machine.device}, torch {machine.torch}, {config.dtype}; {config.steps} steps of {config.tokens:,} letters, "
        f"in words of {config.lengths[0]:,} to {config.lengths[-1]:,}. Right answers in %, to the {config.items} "
        f"questions of each of {config.evaluate.words} words, by length: the lowest and the highest of the seeds. By "
        f"chance: {100 / config.values:.1f} with any value, {100 * by_chance(config):.1f} with that of any of the "
        f"word's {config.items} places.",
        "",
        "| model | parameters | state of a layer | seeds | seconds a run |",
        "| --- " * 5 + "|",
        *_models(results),
    ]
    for task in config.tasks:
        lines += ["", *_shares(results, task)]
    seconds = sum(run.seconds for run in results.runs)
    lines += ["", f"{len(results.runs)} runs, {seconds:,.0f} s of training and testing."]
    return "\n".join(lines) + "\n"


def _models(results: Results) -> Iterator[str]:
    for kind in results.config.models:
        runs = [run for task in results.config.tasks for run in results.of(task, kind)]
        if runs:
            state = "all letters" if runs[0].numbers is None else f"{runs[0].numbers:,}"
            seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
            facts = (name_of(results.config, kind), f"{runs[0].parameters:,}", state, seeds)
            yield f"| {' | '.join(facts)} | {span([run.seconds for run in runs], 0)} |"


def _shares(results: Results, task: str) -> Iterator[str]:
    """Yield the table of one task, where it has runs: a column for each model, a row for each length."""
    found = {kind: runs for kind in results.config.models if (runs := results.of(task, kind))}
    if found:
        yield f"| {task}, letters | {' | '.join(name_of(results.config, kind) for kind in found)} |"
        yield "| --- " * (1 + len(found)) + "|"
        for length in results.config.evaluate.lengths:
            shares = (span([100 * run.accuracy[str(length)] for run in runs], 1) for runs in found.values())
            yield f"| {length:,} | {' | '.join(shares)} |"


def report(results: Results, out: Path, readme: Path | None = None) -> None:
    """Write and print the table, and draw the figures; in a readme, between the marks that it has for that."""
    text = table(results)
    if readme is None:
        write_text(text, out / "table.md")
        draw(results, out)
    else:
        before, after = around(readme, "recall")
        shown = f"\n{picture('recall', SAID)}\n" if draw(results, readme.parent) else ""
        write_text(f"{before}\n\n{text}{shown}\n{after}", readme)
    print(text, end="")


def draw(results: Results, folder: Path) -> bool:
    """Draw right answers by length, for light and for dark pages; return whether it could."""
    return light_and_dark(folder, "recall", partial(_figure, results))


def _figure(results: Results, faint: str) -> Any:
    from matplotlib import pyplot

    tasks = results.config.tasks
    figure, (panels,) = pyplot.subplots(1, len(tasks), figsize=(9, 3.8), squeeze=False, sharey=True)
    for task, axes in zip(tasks, panels, strict=True):
        _panel(axes, results, task, faint)
    panels[0].set_ylabel("right answers, %")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="lower center", ncol=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    return figure


def _panel(axes: Any, results: Results, task: str, faint: str) -> None:
    """Draw the runs of a task, a line for each: seeds that end far apart have no mean that says much."""
    config = results.config
    asked = config.evaluate.lengths
    for kind in config.models:
        for i, run in enumerate(results.of(task, kind)):
            axes.plot(
                asked, [100 * run.accuracy[str(n)] for n in asked], color=COLOURS[kind], marker=MARKERS[kind],
                markersize=2.4 + 1.4 * WIDTHS[kind], linewidth=WIDTHS[kind], zorder=4 - WIDTHS[kind] / 4, clip_on=False,
                label=None if i else name_of(config, kind),
            )  # fmt: skip
    axes.axvline(
        config.lengths[-1], color="#8c959f", linestyle=":", linewidth=1.2, label="longest word of the training"
    )
    axes.axhline(100 / config.values, color="#8c959f", linewidth=0.8, label=f"by chance, 1 of {config.values} values")
    axes.axhline(
        100 * by_chance(config), color="#8c959f", linewidth=0.8, linestyle="--",
        label=f"by chance, 1 of the word's {config.items} places",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(asked, [f"{n:,}" for n in asked], fontsize=8)
    axes.set_yticks(range(0, 101, 20))
    axes.minorticks_off()
    axes.set(title=task, xlabel="letters of a word", ylim=(0, 103))
    axes.grid(color=faint, linewidth=0.4)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
