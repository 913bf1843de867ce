"""Train models to remember over at most 1,024 letters, and ask them over 16,384.

    m2gen build --spec examples/recall/spec.yaml
    python examples/recall/run.py

Finished runs lie in --out and are not run again: interrupted, the same command goes on. It prints the table, and writes
table.md and curves.png (with matplotlib) beside the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from decoder import package_of  # noqa: E402
from train import Config, Outcome, load, train  # noqa: E402

SMOKE = {
    "package": "generated.tiny", "layer": "base", "seeds": [0], "width": 8, "heads": 2, "layers": 1, "rows": 4,
    "window": 4, "items": 2, "keys": 4, "values": 4, "noise": 2, "lengths": [8, 12], "tokens": 24, "steps": 2,
    "warm": 1, "dtype": "fp32", "evaluate": {"lengths": [8, 20], "words": 3, "tokens": 40},
}  # fmt: skip
"""A run of seconds on a CPU, which shows that everything works and nothing else."""


def wanted(config: Config) -> Iterator[tuple[str, str, int]]:
    """Yield (task, model, seed), one seed of everything first."""
    for seed in config.seeds:
        for task in config.tasks:
            yield from ((task, kind, seed) for kind in config.models)


def place_of(out: Path, task: str, kind: str, seed: int) -> Path:
    """Return the file of a run."""
    return out / f"{task}_{kind}_{seed}.json"


def store(path: Path, facts: dict[str, object]) -> None:
    """Write a file whole or not at all."""
    staging = path.with_suffix(".new")
    staging.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    os.replace(staging, path)


def keep(config: Config, out: Path) -> None:
    """Note what the folder's runs are of; ends the program where it has runs of another config."""
    facts = json.loads(json.dumps(asdict(config)))
    for name in ("tasks", "models", "seeds"):  # which runs there are, and not what they do
        del facts[name]
    place = out / "config.json"
    before = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else facts
    changed = sorted(name for name in {*facts, *before} if facts.get(name) != before.get(name))
    if changed:
        raise SystemExit(
            f"{out} must have runs of this config, but has others: {', '.join(changed)}; give another --out"
        )
    store(place, facts)


def run_all(config: Config, out: Path, minutes: float) -> None:
    """Do the runs that have no file yet, while the minutes last."""
    until, device = time.monotonic() + 60 * minutes, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    package = package_of(config.package)
    for task, kind, seed in wanted(config):
        place = place_of(out, task, kind, seed)
        if place.is_file():
            continue
        if time.monotonic() > until:
            print("the minutes are over; run the same command again for what is missing", file=sys.stderr)
            return
        with torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext():
            outcome = train(config, task, kind, seed, package, device)
        store(place, asdict(outcome))
        shares = ", ".join(f"{length}: {share:.3f}" for length, share in outcome.accuracy.items())
        print(
            f"{task} {kind} seed {seed}: loss {outcome.losses[-1]:.4f}, {shares}, {outcome.seconds:.1f} s",
            file=sys.stderr,
        )


def found(config: Config, out: Path) -> list[Outcome]:
    """Return the finished runs."""
    places = (place_of(out, *run) for run in wanted(config))
    return [Outcome(**json.loads(place.read_text(encoding="utf-8"))) for place in places if place.is_file()]


def table(config: Config, outcomes: list[Outcome]) -> str:
    """Return the results as Markdown: a line for each task and model, the lowest and highest share of its seeds."""
    lengths = config.evaluate.lengths
    head = ["task", "model", "parameters", "remembered a layer", *(f"{n:,}" for n in lengths), "seeds", "seconds"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for task in config.tasks:
        for kind in config.models:
            runs = [x for x in outcomes if (x.task, x.model) == (task, kind)]
            if not runs:
                continue
            numbers = "all letters" if runs[0].numbers is None else f"{runs[0].numbers:,}"
            shares = [sorted(100 * x.accuracy[str(n)] for x in runs) for n in lengths]
            cells = [f"{low[0]:.1f} to {low[-1]:.1f}" if low[-1] - low[0] > 0.05 else f"{low[0]:.1f}" for low in shares]
            spent = f"{sum(x.seconds for x in runs) / len(runs):.0f}"
            facts = [task, kind, f"{runs[0].parameters:,}", numbers, *cells, str(len(runs)), spent]
            lines.append(f"| {' | '.join(facts)} |")
    return "\n".join(lines) + "\n"


def draw(config: Config, outcomes: list[Outcome], place: Path) -> None:
    """Draw the share of right answers by length: a panel for each task, a line for each run."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is missing (pip install -e '.[examples]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(config.tasks), figsize=(4.6 * len(config.tasks), 3.2), squeeze=False)
    colors = {kind: f"C{i}" for i, kind in enumerate(config.models)}
    for task, panel in zip(config.tasks, axes[0], strict=True):
        for run in (x for x in outcomes if x.task == task):
            label = run.model if run.seed == config.seeds[0] else None
            points = [int(n) for n in run.accuracy], list(run.accuracy.values())
            panel.plot(*points, color=colors[run.model], marker=".", linewidth=1.2, label=label)
        panel.axhline(1 / config.values, color="grey", linewidth=0.8)
        panel.axvline(config.lengths[-1], color="grey", linestyle=":", linewidth=1)
        panel.set(title=task, xlabel="letters", ylim=(-0.03, 1.03))
        panel.set_xscale("log", base=2)
    axes[0][0].set_ylabel("right answers")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(place, dpi=120)


def main() -> None:
    """Run what is missing, then print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value; YAML")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of runs, table and figure")
    parser.add_argument("--minutes", type=float, default=20.0, help="what has not begun by then is for the next call")
    parser.add_argument("--smoke", action="store_true", help="sizes of seconds on a CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    changes = dict(SMOKE) if arguments.smoke else {}
    changes |= {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in arguments.set)}
    config = load(arguments.config, changes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    keep(config, arguments.out)
    run_all(config, arguments.out, arguments.minutes)
    outcomes = found(config, arguments.out)
    text = table(config, outcomes)
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    draw(config, outcomes, arguments.out / "curves.png")
    print(text, end="")


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise SystemExit(f"{error.filename} must be readable and writable: {error.strerror}") from None
