"""Train M2RNN layers with nothing around them to track A5 and S5, on words without end; show which recipes do.

    m2gen build --spec examples/state_tracking/spec.yaml
    python examples/state_tracking/learn.py
    python examples/state_tracking/learn.py --device cpu --jobs 14 --minutes 60     # the same without a GPU

Every line of learn.yaml's table is a recipe: what it changes in the defaults, and its seeds. Finished runs lie in --out
with the weights that they learned, and are not run again. It prints the table, and writes table.md and summary.json.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from asked import Run, asked_of  # noqa: E402
from construct import points_of  # noqa: E402
from decoder import package_of  # noqa: E402
from files import alone, reachable, store, write_json, write_text  # noqa: E402
from learned import rows_of, table  # noqa: E402
from step import own_stream  # noqa: E402
from streams import Streams, fit, judge  # noqa: E402
from torch import nn  # noqa: E402
from tracker import Tracker, add_noise, begin, keep_gates  # noqa: E402
from words import Answers, group  # noqa: E402

SAID = (64, 128, 256, 512, 1024, 2048)
"""Lengths whose accuracy is recorded."""


def answers_of(run: Run, device: torch.device) -> Answers:
    """Return a run's group, and how its answers are given."""
    problem = group(run.settings["group"]).to(device)
    return Answers(problem, points_of(problem.name) if run.settings["answers"] == "points" else 0)


def layers_of(run: Run, said: Answers, package: ModuleType, backend: str) -> list[nn.Module]:
    """Return a run's layers with their initial values, on the CPU; answers are read from the last."""
    settings, layers = run.settings, list[nn.Module]()
    for left in reversed(range(settings["layers"])):
        layer: nn.Module = package.M2RNN(
            said.problem.order, 1, settings["columns"], dict.fromkeys("qkvfw", settings["heads"]), conv_width=None,
            activation=None, bias=True, norm=settings["norm"], residual=settings["residual"], backend=backend,
        )  # fmt: skip
        begin(layer, said.problem.images.cpu(), said.points, run.start)
        if left:  # at first, the last layer is alone
            nn.init.zeros_(layer.output_projection.weight)
        layers.append(layer)
    return layers


def name_of(device: torch.device) -> str:
    """Name a device as runs record it."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {platform.machine()}"


def train(run: Run, package: ModuleType, evaluate: dict[str, int], device: torch.device) -> tuple[dict[str, Any], Any]:
    """Train a run's layers and judge them; return what is recorded of them, and the weights of each."""
    began = time.perf_counter()
    with own_stream(device):
        said = answers_of(run, device)
        torch.manual_seed(run.seed)
        try:
            layers = layers_of(run, said, package, "kernels" if device.type == "cuda" else "reference")
        except ValueError as error:  # dims that are not built, or options of no sense
            raise SystemExit(f"{run.name}: {error}") from None
        model = Tracker(layers, said.classes, run.settings["repeats"]).to(device)
        for layer in layers:  # noise first: gates that are kept get none
            if run.plan.noise:
                add_noise(layer, run.plan.noise)
            if run.settings["keep_gates"]:
                keep_gates(layer)
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
        "device": name_of(device),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "seconds": round(seconds, 1),
        "known_at": known_at,
        "words": words,
        "accuracy": {
            str(n): 1 - sum(errors[:n]) / (n * words) for n in sorted({*SAID, len(errors)}) if n <= len(errors)
        },
        "perfect_to": next((i for i, wrong in enumerate(errors) if wrong), len(errors)),
        "length": len(errors),
    }, [{name: value.cpu() for name, value in layer.state_dict().items()} for layer in layers]


@contextmanager
def flushing_denormals() -> Iterator[None]:
    """Round denormals to zero: gradients of saturated units are such, and CPUs are slow with them."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def end_with_parent() -> None:
    """Have this process end once its parent has, however that did: the folder is another's then."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@dataclass(frozen=True)
class Call:
    """What a call of the command does: where runs are kept, on what they train, how many at a time, and until when."""

    config: dict[str, Any]
    out: Path
    device: str
    jobs: int
    until: float
    """Seconds of the clock that all processes have, after which no run begins."""

    def missing(self, runs: list[Run]) -> list[Run]:
        """Return the runs that have no file yet."""
        return [run for run in runs if not (self.out / f"{run.name}.json").is_file()]

    def do(self, run: Run) -> None:
        """Train one layer and keep it, unless the time is over."""
        if time.monotonic() >= self.until:
            return
        if self.jobs > 1:
            torch.set_num_threads(1)
        package, device = package_of(self.config["package"]), torch.device(self.device)
        with flushing_denormals():
            row, weights = train(run, package, self.config["evaluate"], device)
        store(self.out / f"{run.name}.pt", partial(torch.save, weights))  # before the row: that says the run is done
        write_json(row, self.out / f"{run.name}.json")
        print(f"{run.name}: {row['steps']} steps, right to {row['perfect_to']}, {row['seconds']} s", file=sys.stderr)

    def do_all(self, runs: list[Run]) -> None:
        """Do the runs that have no file yet, while the time lasts; say how many are left."""
        left = self.missing(runs)
        if left and time.monotonic() < self.until:
            self._check_device(runs)
        if self.jobs == 1:
            for run in left:
                self.do(run)
        else:
            with ProcessPoolExecutor(self.jobs, get_context("spawn"), end_with_parent) as pool:
                try:
                    list(pool.map(self.do, left))
                except BrokenProcessPool:
                    raise SystemExit("a process of a run was ended; the same command goes on with the rest") from None
        if count := len(self.missing(left)):
            print(f"the minutes are over, {count} runs are left; the same command goes on", file=sys.stderr)

    def _check_device(self, runs: list[Run]) -> None:
        """End the program where this would add runs to those of another device: a table has the seconds of one."""
        here = name_of(torch.device(self.device))
        others = {row["device"] for row in rows_of(runs, self.out, self.config["evaluate"])} - {here}
        if others:
            raise SystemExit(f"{self.out} must have runs of {here}, but has those of {min(others)}; give another --out")


def parsed() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "learn.yaml")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "learn", help="folder of runs and table")
    parser.add_argument("--recipes", default="", help="names, with commas; all if none")
    parser.add_argument("--minutes", type=float, default=30.0, help="no run begins after these; 0: only the table")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is a GPU, if not given")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one of a CPU's cores")
    arguments = parser.parse_args()
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    if arguments.jobs > 1 and arguments.device == "cuda":
        parser.error(f"--jobs must be 1 with --device cuda, got {arguments.jobs}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu where torch sees no GPU, got cuda")
    return arguments


def main() -> None:
    """Train what is missing, then print the table."""
    arguments = parsed()
    only = {name for name in arguments.recipes.split(",") if name}
    (config, runs), out = asked_of(arguments.config, only), arguments.out
    with alone(out):
        until = time.monotonic() + 60 * arguments.minutes
        Call(config, out, arguments.device, arguments.jobs, until).do_all(runs)
        rows = list(rows_of(runs, out, config["evaluate"]))
        text = table(runs, rows)
        write_text(text, out / "table.md")
        write_json({"runs": rows}, out / "summary.json")
    print(text, end="")


if __name__ == "__main__":
    with reachable():
        main()
