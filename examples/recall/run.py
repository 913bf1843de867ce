"""Train models to remember over at most 1,024 letters, and ask them over 16,384.

    m2gen build --spec examples/recall/spec.yaml
    python examples/recall/run.py
    python examples/recall/run.py --report OUT/recall.json --readme examples/recall/README.md

Finished runs lie in --out and are not run again: interrupted, the same command goes on. It prints the table, and writes
recall.json with all runs, table.md and, with matplotlib, recall.svg and recall-dark.svg beside them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import curves  # noqa: E402
import outcomes  # noqa: E402
from decoder import package_of  # noqa: E402
from files import alone, reachable, write_json  # noqa: E402
from outcomes import missing, place_of  # noqa: E402
from settings import changes_of  # noqa: E402
from train import Config, load, train  # noqa: E402

SMOKE = {
    "package": "generated.tiny", "layer": "base", "seeds": [0], "width": 8, "heads": 2, "layers": 1, "rows": 4,
    "window": 4, "items": 2, "keys": 4, "values": 4, "noise": 2, "lengths": [8, 12], "tokens": 24, "steps": 2,
    "warm": 1, "dtype": "fp32", "evaluate": {"lengths": [8, 20], "words": 3, "tokens": 40},
}  # fmt: skip
"""A run of seconds on a CPU, which shows that everything works and nothing else."""


def run_all(config: Config, out: Path, minutes: float) -> None:
    """Do the runs that have no file yet, while the minutes last; without such runs no package is needed."""
    left = missing(config, out)
    if not left:
        return
    until, device = time.monotonic() + 60 * minutes, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    package = package_of(config.package)
    for task, kind, seed in left:
        if time.monotonic() > until:
            print("the minutes are over; run the same command again for what is missing", file=sys.stderr)
            return
        with torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext():
            outcome = train(config, task, kind, seed, package, device)
        write_json(asdict(outcome), place_of(out, task, kind, seed))
        shares = ", ".join(f"{length}: {share:.3f}" for length, share in outcome.accuracy.items())
        print(
            f"{task} {kind} seed {seed}: loss {outcome.losses[-1]:.4f}, {shares}, {outcome.seconds:.1f} s",
            file=sys.stderr,
        )


def main() -> None:
    """Run what is missing, or read what was run elsewhere, then print the table and draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value; YAML")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of runs, table and figures")
    parser.add_argument("--minutes", type=float, default=20.0, help="what has not begun by then is for the next call")
    parser.add_argument("--smoke", action="store_true", help="sizes of seconds on a CPU, in Triton's interpreter")
    parser.add_argument("--report", type=Path, metavar="JSON", help="only write table and figures of finished runs")
    parser.add_argument("--readme", type=Path, help="with --report: put the table there, and the figures beside it")
    arguments = parser.parse_args()
    if arguments.readme and not arguments.report:
        parser.error("--readme must be given with --report, got it alone")
    out = arguments.out
    if arguments.report:
        results = outcomes.read(arguments.report)
        if not arguments.readme:
            out.mkdir(parents=True, exist_ok=True)
        curves.report(results, out, arguments.readme)
        return
    changes = dict(SMOKE) if arguments.smoke else {}
    changes |= changes_of(arguments.set)
    config = load(arguments.config, changes)
    with alone(out):
        machine = outcomes.keep(config, out)
        run_all(config, out, arguments.minutes)
        results = outcomes.found(config, out, machine)
        outcomes.write(results, out / "recall.json")
        curves.report(results, out)


if __name__ == "__main__":
    with reachable():
        main()
