"""The table and the figures of finished runs, and whether differences are more than seeds make."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from files import around, write_text
from pictures import light_and_dark, picture

COLOURS = ("#7f7f7f", "#d95f02", "#1f78b4", "#74a9cf", "#8b6fc6", "#e7298a", "#1b9e77")
SAID = "validation perplexity against tokens and against seconds of training"
"""What the figure shows, for who does not see it."""
TICKS = (1.0, 1.5, 2.0, 2.2, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
"""Perplexities at which the figure has a line, and ten times as much."""
LARGEST = math.log(sys.float_info.max)
"""The nats of the largest perplexity that is a number."""
LEVEL = 0.05
"""Chance of a table that says of some difference, where there is none, that it is more than seeds make."""


@dataclass(frozen=True)
class Difference:
    """The mean difference of pairs, its 95 % interval to both sides, and the probability of one as large by chance."""

    mean: float
    half: float
    chance: float


def paired(one: Sequence[float], other: Sequence[float]) -> Difference:
    """Return the difference of two models over the seeds that both have, by Student's t for pairs."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    if len(differences) < 2:
        return Difference(mean(differences), math.inf, 1.0)
    degrees, error = len(differences) - 1, deviation(differences) / math.sqrt(len(differences))
    t = abs(mean(differences)) / error if error else math.inf if any(differences) else 0.0
    return Difference(mean(differences), quantile(degrees) * error, 2 * tail(t, degrees))


def holm(chances: Sequence[float]) -> list[float]:
    """Return probabilities by chance, corrected for how many there are by Holm's rule; NaN for NaN."""
    order = sorted(range(len(chances)), key=lambda i: (math.isnan(chances[i]), chances[i]))
    corrected, so_far = [math.nan] * len(chances), 0.0
    for rank, i in enumerate(order):
        if not math.isnan(chances[i]):
            so_far = max(so_far, min(1.0, (len(chances) - rank) * chances[i]))
            corrected[i] = so_far
    return corrected


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation; NaN where a run has diverged, which ``stdev`` does not take."""
    return stdev(values) if all(map(math.isfinite, values)) else math.nan


def tail(t: float, degrees: int) -> float:
    """Return the probability that Student's t of some degrees of freedom is above t >= 0."""
    # The density in the angle of t = sqrt(degrees) tan(angle) is a power of its cosine.
    begin, steps = math.atan(t / math.sqrt(degrees)), 2000
    width = (math.pi / 2 - begin) / steps
    middle = sum(math.cos(begin + (i + 0.5) * width) ** (degrees - 1) for i in range(steps)) * width
    logarithm = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    return math.exp(logarithm) / math.sqrt(math.pi) * middle


def quantile(degrees: int, beyond: float = 0.025) -> float:
    """Return the t that is exceeded with a probability, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, degrees) > beyond else (low, middle)
    return high


def runs_of(data: dict[str, Any], size: str, variant: str) -> list[dict[str, Any]]:
    """Return the runs of a model, by seed."""
    found = [run for run in data["runs"] if (run["size"], run["variant"]) == (size, variant)]
    return sorted(found, key=lambda run: run["seed"])


def spread(values: Sequence[float], digits: int) -> str:
    """Write a mean and the standard deviation over seeds."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {deviation(values):.{digits}f}" if len(values) > 1 else text


def words(nats: float) -> float:
    """Return the perplexity of a byte; infinity for one beyond all numbers, as of a run that has diverged."""
    return math.inf if nats > LARGEST else math.exp(nats)


def table(data: dict[str, Any]) -> str:
    """Return the tables: a row for each model, and one for each difference."""
    steps, tokens = data["plan"]["steps"], data["runs"][0]["tokens_a_step"]
    text = data["text"]
    lines = [
        f"{data['device']}, torch {data['torch']}, {data['plan']['dtype']}; {steps} steps of {tokens:,} bytes "
        f"({steps * tokens / 1e6:.1f} MB), sequences of {data['plan']['seq']}. Text: {text['train_files']:,} files "
        f"of {text['train_bytes'] / 1e6:.1f} MB to train on, {text['validation_files']:,} others of "
        f"{text['validation_bytes'] / 1e6:.1f} MB to judge by (SHA-256 {text['digest']}). ± is the standard deviation "
        f"over seeds; states and caches are in numbers, of a sequence. In the figure, runs are judged by "
        f"{data['plan']['validation']['curve']:,} bytes, and bands go from the lowest seed to the highest.",
        "",
        "| size | mixers | seeds | parameters | state of a layer | bits a byte | perplexity of a byte "
        "| training, s | tokens/s |",
        "| --- " * 9 + "|",
    ]
    for size in data["sizes"]:
        for variant in data["variants"]:
            runs = runs_of(data, size, variant)
            lines += [_row(data, size, variant, runs)] if runs else []
    lines += ["", *_differences(data)]
    seconds = sum(run["seconds"] for run in data["runs"])
    lines += ["", f"{len(data['runs'])} runs, {seconds:,.0f} s of training."]
    return "\n".join(lines) + "\n"


def _row(data: dict[str, Any], size: str, variant: str, runs: list[dict[str, Any]]) -> str:
    states = ", ".join(f"{NAMES.get(kind, kind)} {count:,}" for kind, count in runs[0]["states"].items())
    seeds = ", ".join(str(run["seed"]) for run in runs)
    total = data["plan"]["steps"] * runs[0]["tokens_a_step"]
    finals = [run["final"] for run in runs]
    bits = spread([nats / math.log(2) for nats in finals], 4)
    perplexity = spread([words(nats) for nats in finals], 4)
    seconds = [run["seconds"] for run in runs]
    return (
        f"| {size} | {variant} | {seeds} | {runs[0]['parameters']:,} | {states} | {bits} | {perplexity} "
        f"| {mean(seconds):.0f} | {total / mean(seconds):,.0f} |"
    )


NAMES = {"attention": "cache", "m2rnn": "M²RNN"} | dict.fromkeys(
    ("gated_deltanet", "gated_deltanet_small"), "Gated DeltaNet"
)
"""Names of what layers keep."""


def _differences(data: dict[str, Any]) -> list[str]:
    """Return the table of differences, of each pair of models that were both trained from some seed."""
    asked = [(size, one, other) for size in data["sizes"] for one, other in data["compare"]]
    pairs = {row: both for row in asked if (both := _of_one_seed(data, *row))}
    found = {row: paired(*zip(*both, strict=True)) for row, both in pairs.items()}
    tested = [row for row, both in pairs.items() if len(both) > 1]
    corrected = dict(zip(tested, holm([found[row].chance for row in tested]), strict=True))
    lines = ["| size | difference of the perplexity of a byte | seeds | mean, 95 % interval | p | p by Holm "
             "| more than seeds make |", "| --- " * 7 + "|"]  # fmt: skip
    for row, both in pairs.items():
        size, one, other = row
        begin = f"| {size} | {one} less {other} | {len(both)} | {found[row].mean:+.4f}"
        if row not in corrected:
            lines.append(f"{begin} |  |  | one seed |")
            continue
        half = f" ± {found[row].half:.4f}" if math.isfinite(found[row].half) else ""
        verdict = "yes" if corrected[row] < LEVEL else "no"
        lines.append(f"{begin}{half} | {found[row].chance:.3f} | {corrected[row]:.3f} | {verdict} |")
    return lines


def _of_one_seed(data: dict[str, Any], size: str, one: str, other: str) -> list[tuple[float, float]]:
    """Return the perplexities of two models, from each seed that both have."""
    first, second = ({run["seed"]: words(run["final"]) for run in runs_of(data, size, name)} for name in (one, other))
    return [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]


def write(data: dict[str, Any], out: Path, readme: Path | None = None) -> None:
    """Write and print the table, and draw the figures; in a readme, between the marks that it has for that."""
    text = table(data)
    print(text, end="")
    if readme is None:
        write_text(text, out / "hybrids.md")
        draw(data, out)
        return
    before, after = around(readme, "hybrids")
    shown = picture("hybrids", SAID) if draw(data, readme.parent) else ""
    write_text(f"{before}\n\n{shown}\n\n{text}\n{after}", readme)


def draw(data: dict[str, Any], folder: Path) -> bool:
    """Draw validation perplexity against tokens and seconds, for light and for dark pages; return whether it could."""
    return light_and_dark(folder, "hybrids", partial(_figure, data))


def _figure(data: dict[str, Any], faint: str) -> Any:
    from matplotlib import pyplot, ticker

    sizes = list(data["sizes"])
    figure, grid = pyplot.subplots(len(sizes), 2, figsize=(9, 3.2 * len(sizes)), squeeze=False, sharey="row")
    for row, size in zip(grid, sizes, strict=True):
        for axes, label in zip(row, ("million bytes", "seconds of training"), strict=True):
            for variant, colour in zip(data["variants"], COLOURS * len(data["variants"]), strict=False):
                if runs := runs_of(data, size, variant):
                    _curve(axes, runs, variant, colour, label == "million bytes")
            axes.set(xlabel=label, yscale="log")
            axes.set_ylim(top=_top(data, size))
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=TICKS))
            axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
            axes.grid(color=faint, linewidth=0.4)
            axes.set_facecolor("none")
        row[0].set_ylabel(f"perplexity of a byte, {size}")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="lower center", ncol=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.6 / figure.get_figheight(), 1, 1))
    return figure


def _top(data: dict[str, Any], size: str) -> float | None:
    """Return the worst perplexity in the middle of the steps: what comes before would hide how models differ.

    Runs that have diverged do not count; None where all have.
    """
    curves = [run["curve"] for run in data["runs"] if run["size"] == size]
    found = [words(curve[(len(curve) - 1) // 2][3]) for curve in curves]
    return max(filter(math.isfinite, found), default=None)


def _curve(axes: Any, runs: list[dict[str, Any]], variant: str, colour: str, by_tokens: bool) -> None:
    """Draw the mean over seeds, and the range of the seeds around it."""
    curves = [[words(nats) for *_, nats in run["curve"]] for run in runs]
    points = range(len(curves[0]))
    middle = [mean(curve[i] for curve in curves) for i in points]
    if by_tokens:
        x = [step * runs[0]["tokens_a_step"] / 1e6 for step, *_ in runs[0]["curve"]]
    else:
        x = [mean(run["curve"][i][1] for run in runs) for i in points]
    axes.plot(x, middle, color=colour, linewidth=1.3, label=variant)
    axes.fill_between(
        x, [min(c[i] for c in curves) for i in points], [max(c[i] for c in curves) for i in points], color=colour,
        alpha=0.25, linewidth=0,
    )  # fmt: skip
