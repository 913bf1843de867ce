"""Train models on word problems of groups, and show at which lengths they still know the answer.

    m2gen build --spec examples.yaml
    python examples/state_tracking/run.py

Finished runs lie in --out and are not run again: interrupted, the same command goes on. It prints the table, and writes
table.md, its numbers as summary.json, and curves.png (with matplotlib) beside the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from decoder import package_of  # noqa: E402
from files import alone, reachable, write_json, write_text  # noqa: E402
from settings import changes_of  # noqa: E402
from train import Config, Outcome, load, train  # noqa: E402

SMOKE = {
    "package": "generated.tiny", "layer": "base", "groups": ["S3"], "seeds": [0], "width": 8, "heads": 2, "layers": 1,
    "lengths": [2, 3], "batch": 2, "steps": 2, "settle": 1, "evaluate": {"length": 5, "words": 2, "at_once": 1},
}  # fmt: skip
"""A run of seconds on a CPU, which shows that everything works and nothing else."""
UNKNOWN = {"device": "unknown device", "torch": "unknown"}
"""What made the runs of a folder that does not say, as one from before folders did."""


def wanted(config: Config) -> Iterator[tuple[str, str, int]]:
    """Yield (model, group, seed), the claim first."""
    for name in config.groups:
        for kind in config.models:
            yield from ((kind, name, seed) for seed in config.seeds)


def place_of(out: Path, kind: str, name: str, seed: int) -> Path:
    """Return the file of a run."""
    return out / f"{name}_{kind}_{seed}.json"


def here() -> dict[str, str]:
    """Return what makes runs on this machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "torch": torch.__version__}


def keep(config: Config, out: Path) -> str:
    """Note what the folder's runs are of, and return the device that made them.

    Ends the program where the folder has runs of another config, or where this machine would add to those of another.
    """
    facts = json.loads(json.dumps(here() | asdict(config)))
    for name in ("groups", "models", "seeds", "budget"):  # which runs there are, and not what they do
        del facts[name]
    place = out / "config.json"
    has_runs = any(out.glob("*_*_*.json"))  # a command that ended before its first has left a config alone
    before = UNKNOWN | json.loads(place.read_text(encoding="utf-8")) if has_runs and place.is_file() else facts
    if all(place_of(out, *run).is_file() for run in wanted(config)):  # a table of finished runs can be made anywhere
        facts |= {name: before[name] for name in UNKNOWN}
    changed = sorted(name for name in {*facts, *before} if facts.get(name) != before.get(name))
    if changed:
        raise SystemExit(
            f"{out} must have runs of this config, but has others: {', '.join(changed)}; give another --out"
        )
    write_json(facts, place)
    return str(facts["device"])


def run_all(config: Config, out: Path) -> None:
    """Do the runs that have no file yet, while the budget lasts."""
    began, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    package = package_of(config.package)
    for kind, name, seed in wanted(config):
        place = place_of(out, kind, name, seed)
        if place.is_file():
            continue
        if time.monotonic() - began > config.budget:
            print(f"{config.budget:.0f} s are over; run the same command again for what is missing", file=sys.stderr)
            return
        outcome = train(config, kind, name, seed, package, device)
        write_json(asdict(outcome), place)
        print(
            f"{name} {kind} seed {seed}: {outcome.steps} steps, trained to {outcome.trained_to} (lengths known at "
            f"{outcome.known_at}), loss {outcome.losses[-1]:.4f}, right to {outcome.perfect_to}, "
            f"{outcome.seconds:.1f} s",
            file=sys.stderr,
        )


def found(config: Config, out: Path) -> list[Outcome]:
    """Return the finished runs."""
    places = (place_of(out, *run) for run in wanted(config))
    return [Outcome(**json.loads(place.read_text(encoding="utf-8"))) for place in places if place.is_file()]


def table(config: Config, outcomes: list[Outcome]) -> str:
    """Return the results as Markdown: a line for each group and model, a number for each seed."""
    seen, asked = config.lengths[-1], config.evaluate.length
    lines = [
        f"| group | model | accuracy to {seen} | accuracy to {asked} | right to position | perfect seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in config.groups:
        for kind in config.models:
            runs = [x for x in outcomes if (x.group, x.model) == (name, kind)]
            cells = [
                ", ".join(f"{100 * x.accuracy(0, seen):.2f}" for x in runs),
                ", ".join(f"{100 * x.accuracy(0, asked):.2f}" for x in runs),
                ", ".join(str(x.perfect_to) for x in runs),
                f"{sum(x.perfect_to == asked for x in runs)} of {len(config.seeds)}",
            ]
            if len(runs) < len(config.seeds):
                cells[-1] += f" ({len(runs)} run)"
            lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary(config: Config, outcomes: list[Outcome], device: str) -> dict[str, object]:
    """Return what the table says of each run of a device, as docs/data/ keeps it for the picture of the README."""
    seen, asked = config.lengths[-1], config.evaluate.length
    runs = [
        {
            "group": x.group,
            "model": x.model,
            "seed": x.seed,
            "accuracy_seen": round(x.accuracy(0, seen), 4),
            "accuracy_asked": round(x.accuracy(0, asked), 4),
            "right_to": x.perfect_to,
            "steps": x.steps,
            "trained_to": x.trained_to,
            "seconds": round(x.seconds, 1),
        }
        for x in outcomes
    ]
    return {
        "command": shlex.join(["python", "examples/state_tracking/run.py", *sys.argv[1:]]),
        "device": device,
        "seen": seen,
        "asked": asked,
        "runs": runs,
    }


def windows(positions: int, each: float = 1.15) -> list[int]:
    """Return the edges of windows of positions that grow with the position: a point of a curve each."""
    edges = [0]
    while edges[-1] < positions:
        edges.append(min(positions, max(edges[-1] + 1, round(edges[-1] * each))))
    return edges


def draw(config: Config, outcomes: list[Outcome], place: Path) -> None:
    """Draw the share of right answers by position: a panel for each group, a line for each run."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is missing (pip install -e '.[examples]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(config.groups), figsize=(4.2 * len(config.groups), 3.2), squeeze=False)
    colors = dict(zip(config.models, pyplot.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for name, panel in zip(config.groups, axes[0], strict=True):
        for outcome in reversed([x for x in outcomes if x.group == name]):  # the first model on top
            edges = windows(len(outcome.errors))
            shares = [outcome.accuracy(start, end) for start, end in pairwise(edges)]
            label = outcome.model if outcome.seed == config.seeds[0] else None
            width = 2.5 if outcome.model == config.models[-1] else 1.2  # and the last shows at its sides
            panel.plot([i + 1 for i in edges[:-1]], shares, color=colors[outcome.model], linewidth=width, label=label)
        panel.axvline(config.lengths[-1], color="grey", linestyle=":", linewidth=1)
        panel.set(title=name, xlabel="position", ylim=(-0.03, 1.03), xscale="log")
    axes[0][0].set_ylabel("right answers")
    handles, labels = axes[0][0].get_legend_handles_labels()
    axes[0][0].legend(handles[::-1], labels[::-1], fontsize=8)
    figure.tight_layout()
    figure.savefig(place, dpi=120)


def parsed() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value; YAML")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of runs, table and figure")
    parser.add_argument("--smoke", action="store_true", help="sizes of seconds on a CPU, in Triton's interpreter")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then print the table and draw the figure."""
    arguments = parsed()
    changes = dict(SMOKE) if arguments.smoke else {}
    changes |= changes_of(arguments.set)
    config = load(arguments.config, changes)
    with alone(arguments.out):
        device = keep(config, arguments.out)
        run_all(config, arguments.out)
        outcomes = found(config, arguments.out)
        text = table(config, outcomes)
        write_text(text, arguments.out / "table.md")
        write_json(summary(config, outcomes, device), arguments.out / "summary.json")
        draw(config, outcomes, arguments.out / "curves.png")
    print(text, end="")


if __name__ == "__main__":
    with reachable():
        main()
