"""Ask the layers that learn.py trained about words longer than any that they were judged on, from the weights it kept.

    python examples/state_tracking/longer.py --out OUT --length 16384

It prints a table of the finished runs in OUT, and writes longer.md and longer.json there; nothing is trained.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from asked import Run, asked_of  # noqa: E402
from decoder import package_of  # noqa: E402
from files import alone, reachable, write_json, write_text  # noqa: E402
from learn import Answers, answers_of, layers_of, name_of  # noqa: E402
from learned import rows_of  # noqa: E402
from streams import judge  # noqa: E402
from tracker import Tracker  # noqa: E402


def longer_row(run: Run, out: Path, config: dict[str, Any], asked: dict[str, int]) -> dict[str, Any]:
    """Return what a finished run's layers come to on words of another length."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    said: Answers = answers_of(run, device)
    layers = layers_of(run, said, package_of(config["package"]), "kernels" if device.type == "cuda" else "reference")
    kept = torch.load(out / f"{run.name}.pt", map_location="cpu", weights_only=True)
    for layer, weights in zip(layers, kept, strict=True):
        layer.load_state_dict(weights)
    wrong = judge(Tracker(layers, said.classes, run.settings["repeats"]).to(device), said, **asked)
    right = 1 - sum(wrong) / (asked["words"] * asked["length"])
    perfect_to = next((i for i, errors in enumerate(wrong) if errors), len(wrong))
    found = {"recipe": run.recipe, "seed": run.seed, "device": name_of(device), **asked}
    return found | {"accuracy": right, "perfect_to": perfect_to}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: a line for each recipe, a number for each seed."""
    lines = ["| recipe | seeds | words | length | accuracy to the end | right to position |", f"|{' --- |' * 6}"]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        found = [row for row in rows if row["recipe"] == recipe]
        cells = [recipe, ", ".join(str(row["seed"]) for row in found)]
        cells += [f"{found[0]['words']:,}", f"{found[0]['length']:,}"]
        cells.append(", ".join(f"{100 * row['accuracy']:.4f}" for row in found))
        cells.append(", ".join(f"{row['perfect_to']:,}" for row in found))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Judge the finished runs of a folder and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "learn.yaml")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "learn", help="folder of learn.py's runs")
    parser.add_argument("--recipes", default="", help="names, with commas; all if none")
    parser.add_argument("--length", type=int, default=16384, help="letters of a word")
    parser.add_argument("--words", type=int, default=256)
    given = parser.parse_args()
    if min(given.length, given.words) < 1:
        parser.error(f"--length and --words must be at least 1, got {given.length} and {given.words}")
    if not given.out.is_dir():
        raise SystemExit(f"{given.out} must be a folder of learn.py's runs")
    config, runs = asked_of(given.config, {name for name in given.recipes.split(",") if name})
    with alone(given.out):
        done = {(row["recipe"], row["seed"]) for row in rows_of(runs, given.out, config["evaluate"])}
        finished = [run for run in runs if (run.recipe, run.seed) in done]
        if not finished:
            raise SystemExit(f"{given.out} must have a finished run, but has none of these recipes")
        asked = {"words": given.words, "length": given.length}
        rows = [longer_row(run, given.out, config, asked) for run in finished]
        text = table(rows)
        write_text(text, given.out / "longer.md")
        write_json({"runs": rows}, given.out / "longer.json")
    print(text, end="")


if __name__ == "__main__":
    with reachable():
        main()
