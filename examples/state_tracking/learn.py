"""Train single M2RNN layers to track A5 and S5, on words without end, and show which recipes do.

    m2gen build --spec examples/state_tracking/spec.yaml
    python examples/state_tracking/learn.py

Every line of learn.yaml's table is a recipe: what it changes in the defaults, and its seeds. Finished runs lie in --out
with the weights that they learned, and are not run again. It prints the table, and writes table.md and summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from construct import points_of  # noqa: E402
from decoder import package_of  # noqa: E402
from files import alone, store, write_json, write_text  # noqa: E402
from many import Answers  # noqa: E402
from step import own_stream  # noqa: E402
from streams import Plan, Streams, fit, judge  # noqa: E402
from torch import nn  # noqa: E402
from tracker import Start, Tracker, begin, keep_gates  # noqa: E402
from words import group  # noqa: E402

SAID = (64, 128, 256, 512, 1024, 2048)
"""Lengths whose accuracy is recorded."""
SHAPE = ("group", "heads", "columns", "answers", "norm", "residual", "keep_gates")
"""Settings of a layer and its answers; all others are a ``Plan``'s or a ``Start``'s."""


@dataclass(frozen=True)
class Run:
    """One layer to be trained: its recipe's name, what that changes, all settings, and the seed."""

    recipe: str
    changes: dict[str, Any]
    settings: dict[str, Any]
    seed: int

    @property
    def name(self) -> str:
        """The run's name, which its files have."""
        return f"{self.recipe}_{self.seed}"

    @property
    def plan(self) -> Plan:
        """How it is trained."""
        values = {one.name: self.settings[one.name] for one in fields(Plan)}
        return Plan(**values | {"letters": tuple(values["letters"])})

    @property
    def start(self) -> Start:
        """What it begins with."""
        return Start(**{one.name: self.settings[one.name] for one in fields(Start)})


def runs_of(config: dict[str, Any], only: set[str]) -> list[Run]:
    """Return the runs of the recipes named in ``only``, or of all; ends the program where settings are unknown."""
    known = {*SHAPE, *(one.name for one in (*fields(Plan), *fields(Start)))}
    names = {recipe["name"] for recipe in config["recipes"]}
    if only - names:
        raise SystemExit(f"--recipes must be of {', '.join(sorted(names))}, got {', '.join(sorted(only - names))}")
    runs = []
    for recipe in config["recipes"]:
        changes = {key: value for key, value in recipe.items() if key not in ("name", "seeds")}
        settings = config["defaults"] | changes
        if {*settings} != known:
            raise SystemExit(f"recipe {recipe['name']}: see {', '.join(sorted({*settings} ^ known))}")
        if not only or recipe["name"] in only:
            runs += [Run(recipe["name"], changes, settings, seed) for seed in recipe["seeds"]]
    return runs


def layer_of(run: Run, said: Answers, package: ModuleType, backend: str) -> nn.Module:
    """Return a run's layer with its initial values, on the CPU."""
    settings = run.settings
    layer: nn.Module = package.M2RNN(
        said.problem.order, 1, settings["columns"], dict.fromkeys("qkvfw", settings["heads"]), conv_width=None,
        activation=None, bias=True, norm=settings["norm"], residual=settings["residual"], backend=backend,
    )  # fmt: skip
    begin(layer, said.problem.images.cpu(), said.points, run.start)
    return layer


def train(run: Run, package: ModuleType, evaluate: dict[str, int], device: torch.device) -> tuple[dict[str, Any], Any]:
    """Train one layer and judge it; return what is recorded of it, and its weights."""
    began = time.perf_counter()
    with own_stream(device):
        problem = group(run.settings["group"]).to(device)
        said = Answers(problem, points_of(problem.name) if run.settings["answers"] == "points" else 0)
        torch.manual_seed(run.seed)
        layer = layer_of(run, said, package, "kernels" if device.type == "cuda" else "reference").to(device)
        if run.settings["keep_gates"]:
            keep_gates(layer)
        model = Tracker(layer, said.classes)
        known_at, steps = fit(
            Streams(model, said, run.plan, run.seed), lambda text: print(f"{run.name} {text}", file=sys.stderr)
        )
        seconds = time.perf_counter() - began
        errors = judge(model, said, **evaluate)
    words = evaluate["words"]
    return {
        "recipe": run.recipe,
        "seed": run.seed,
        "settings": run.settings,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in layer.parameters()),
        "steps": steps,
        "seconds": round(seconds, 1),
        "known_at": known_at,
        "words": words,
        "accuracy": {str(n): 1 - sum(errors[:n]) / (n * words) for n in SAID if n <= len(errors)},
        "perfect_to": next((i for i, wrong in enumerate(errors) if wrong), len(errors)),
        "length": len(errors),
    }, {name: value.cpu() for name, value in layer.state_dict().items()}


def rows_of(runs: list[Run], out: Path) -> Iterator[dict[str, Any]]:
    """Yield what is recorded of the runs that are there; ends the program where one is of other settings."""
    for run in runs:
        place = out / f"{run.name}.json"
        if place.is_file():
            row = json.loads(place.read_text(encoding="utf-8"))
            if row["settings"] != json.loads(json.dumps(run.settings)):
                raise SystemExit(f"{place} must be of {run.recipe}'s settings, but is of others; give another --out")
            yield row


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
            ", ".join(f"{100 * list(row['accuracy'].values())[-1]:.2f}" if row["accuracy"] else "" for row in found),
            ", ".join(str(row["perfect_to"]) for row in found),
            f"{sum(row['perfect_to'] == row['length'] for row in found)} of {len(found)}",
        ]
        if len(found) < len(asked):
            cells[-1] += f" ({len(asked) - len(found)} not run)"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parsed() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "learn.yaml")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "learn", help="folder of runs and table")
    parser.add_argument("--recipes", default="", help="names, with commas; all if none")
    parser.add_argument("--minutes", type=float, default=20.0, help="no run begins after these; 0: only the table")
    return parser.parse_args()


def run_all(config: dict[str, Any], runs: list[Run], out: Path, minutes: float) -> None:
    """Do the runs that have no file yet, while the minutes last."""
    until, device = time.monotonic() + 60 * minutes, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_flush_denormal(True)  # gradients of saturated units are such, and CPUs slow with them
    package = package_of(config["package"])
    left = [run for run in runs if not (out / f"{run.name}.json").is_file()]
    for i, run in enumerate(left):
        if time.monotonic() >= until:
            print(f"the minutes are over, {len(left) - i} runs are left; the same command goes on", file=sys.stderr)
            return
        row, weights = train(run, package, config["evaluate"], device)
        store(out / f"{run.name}.pt", partial(torch.save, weights))  # before the row, which says that the run is done
        write_json(row, out / f"{run.name}.json")
        print(f"{run.name}: {row['steps']} steps, right to {row['perfect_to']}, {row['seconds']} s", file=sys.stderr)


def main() -> None:
    """Train what is missing, then print the table."""
    arguments = parsed()
    config, out = yaml.safe_load(arguments.config.read_text(encoding="utf-8")), arguments.out
    runs = runs_of(config, {name for name in arguments.recipes.split(",") if name})
    with alone(out):
        run_all(config, runs, out, arguments.minutes)
        rows = list(rows_of(runs, out))
        text = table(runs, rows)
        write_text(text, out / "table.md")
        write_json({"runs": rows}, out / "summary.json")
    print(text, end="")


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise SystemExit(f"{error.filename} must be readable and writable: {error.strerror}") from None
