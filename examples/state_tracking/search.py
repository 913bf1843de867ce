"""Train many small M2RNNs on the words of a group, and say which recipes track it at lengths never seen.

    m2gen build --spec examples/state_tracking/spec.yaml
    python examples/state_tracking/search.py --minutes 8 --out OUT

Models of one shape train at once. A finished stack has a file in --out and is not trained again; an interrupted one
goes on from its checkpoint. It prints the table of everything there, and writes table.md and search.png beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from construct import begin_automaton  # noqa: E402
from decoder import Decoder, package_of  # noqa: E402
from files import alone, reachable, store, write_text  # noqa: E402
from findings import draw, table  # noqa: E402
from many import Answers, Many, Progress, judge  # noqa: E402
from members import LATER, SHAPE, Member, check, facts_of, load, members_of  # noqa: E402
from stack import Stack  # noqa: E402
from step import own_stream  # noqa: E402
from words import group  # noqa: E402

SAID = (64, 128, 256, 512, 1024, 2048)
"""Lengths whose accuracy is recorded."""


@torch.no_grad()
def model_of(member: Member, said: Answers, package: ModuleType, backend: str = "reference") -> Decoder:
    """Return an untrained model; its layers are the package's, which the reference backend runs with any dims."""
    torch.manual_seed(member.seed)
    settings, order = member.settings, said.problem.order
    heads = dict.fromkeys("qkvfw", settings["heads"])
    mixers = [
        package.M2RNN(
            settings["width"], settings["rows"], settings["columns"], heads, conv_width=None,
            activation=settings["activation"], bias=settings["bias"], backend=backend,
        )
        for _ in range(settings["layers"])
    ]  # fmt: skip
    for mixer in mixers:
        mixer.decay_gate.A_log.zero_()
        mixer.decay_gate.dt_bias.fill_(math.log(math.expm1(-math.log(settings["forget"]))))
        if settings["weights"] == "automaton":
            begin_automaton(mixer, settings["spin"], settings["scale"])
            continue
        for weight in mixer.state_weight:
            torch.nn.init.orthogonal_(weight, gain=settings["spin"])
        operands = settings["heads"] * (2 * settings["rows"] + settings["columns"])
        mixer.input_projection.weight[:operands] *= settings["scale"]
    model = Decoder(mixers, settings["width"], order, said.classes)
    model.embed.weight.normal_(std=settings["embed"])
    return model


class Running:
    """A stack in training, which can be left and taken up again."""

    def __init__(
        self, config: dict[str, Any], asked: dict[str, Any], package: ModuleType, device: torch.device
    ) -> None:
        self.config, self.asked, self.seconds = config, asked, 0.0
        self.members = members_of(config, asked)
        self.problem = group(asked.get("group", config["group"])).to(device)
        self.package = package
        by_points = self.members[0].settings["answers"] == "points"
        self.said = Answers(self.problem, self.problem.images.shape[1] if by_points else 0)
        models = [model_of(member, self.said, package) for member in self.members]
        backend = "kernels" if device.type == "cuda" else "reference"
        self.stack = Stack(models, package.m2rnn, backend, device)
        progress = [Progress(member.plan, member.seed) for member in self.members]
        settings = self.members[0].settings
        torch.manual_seed(1000)
        self.many = Many(self.stack, self.said, progress, settings["batch"], settings["tokens"])

    def save(self, place: Path) -> None:
        """Write all that training goes on from."""
        many = self.many
        tensors = {"flat": self.stack.flat, "moments": many.moments, "count": many.count}
        progress = [(one.known_at, one.end, one.last, one.random.getstate()) for one in many.progress]
        facts = facts_of(self.config, self.asked)
        saved = {**tensors, "facts": facts, "progress": progress, "done": many.done, "seconds": self.seconds}
        store(place, partial(torch.save, saved))

    def load(self, place: Path) -> None:
        """Go on from what ``save`` wrote, if it was of the same settings; others end the program."""
        found, many = torch.load(place, map_location="cpu", weights_only=True), self.many
        facts = facts_of(self.config, self.asked)
        check(place, found, {name: value for name, value in facts.items() if name not in LATER})
        for name, tensor in (("flat", self.stack.flat), ("moments", many.moments), ("count", many.count)):
            tensor.copy_(found[name])
        for one, (known_at, end, last, state) in zip(many.progress, found["progress"], strict=True):
            one.known_at, one.end, one.last = known_at, end, last
            one.random.setstate(state)
        many.done, self.seconds = found["done"], found["seconds"]
        torch.manual_seed(1000 + many.done)

    @property
    def finished(self) -> bool:
        """Whether its time is over, or no model has steps left."""
        return self.seconds >= self.asked["seconds"] or all(self.many.done >= one.end for one in self.many.progress)

    def train(self, until: float) -> None:
        """Train until it is finished or a time of ``time.monotonic``."""
        said = 0.0
        while not self.finished and time.monotonic() < until:
            began = time.monotonic()
            self.many.round()
            self.seconds += time.monotonic() - began
            if self.seconds - said > 15:
                said = self.seconds
                where = ", ".join(f"{one.stage[0] or ''}x{one.stage[1]}:{one.last:.2f}" for one in self.many.progress)
                print(f"{self.asked['name']} {self.seconds:.0f} s, step {self.many.done}: {where}", file=sys.stderr)

    def rows(self) -> list[dict[str, Any]]:
        """Judge every model, and return what is recorded of it."""
        asked = self.config["evaluate"]
        wrong = judge(self.stack, len(self.members), self.said, asked).tolist()
        return [
            {
                "stack": self.asked["name"],
                "group": self.problem.name,
                "changes": member.changes,
                "seed": member.seed,
                **{name: member.settings[name] for name in SHAPE[:8]},
                "parameters": self.stack.flat.shape[1],
                "steps": min(self.many.done, one.end),
                "seconds": round(self.seconds, 1),
                "models": len(self.members),
                "known_at": [[*stage, step] for stage, step in zip(one.plan.stages, one.known_at, strict=False)],
                "stage": one.stage,
                "last": round(one.last, 4),
                "accuracy": {
                    n: 1 - sum(errors[:n]) / (asked["words"] * n)
                    for n in sorted({*SAID, asked["length"]})
                    if n <= asked["length"]
                },
                "perfect_to": perfect_to(errors),
                "layer": None if any(errors) else self.by_layer(i),
            }
            for i, (member, one, errors) in enumerate(zip(self.members, self.many.progress, wrong, strict=True))
        ]

    @torch.no_grad()
    def by_layer(self, i: int) -> dict[str, Any]:
        """Judge a model by itself, of the package's own layers: on kernels, where its heads are built."""
        device = self.problem.table.device
        try:
            backend = "kernels" if device.type == "cuda" else "reference"
            model = model_of(self.members[i], self.said, self.package, backend)
        except ValueError:
            backend = "reference"
            model = model_of(self.members[i], self.said, self.package)
        model.load_state_dict(self.stack.state_of(i))
        model.to(device)
        errors = judge(lambda letters: model(letters[0])[None], 1, self.said, self.config["evaluate"])[0].tolist()
        return {"backend": backend, "perfect_to": perfect_to(errors)}


def perfect_to(errors: list[int]) -> int:
    """Return how many positions are before the first wrong answer to any word."""
    return next((i for i, count in enumerate(errors) if count), len(errors))


def search(config: dict[str, Any], out: Path, minutes: float, only: list[str]) -> None:
    """Train what is not finished, in the config's order, while the minutes last."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    package, until = package_of(config["package"]), time.monotonic() + 60 * minutes
    for asked in config["stacks"]:
        place, checkpoint = out / f"{asked['name']}.json", out / f"{asked['name']}.pt"
        if place.is_file() or (only and asked["name"] not in only):
            continue
        if time.monotonic() >= until:
            print("the minutes are over; run the same command again for what is missing", file=sys.stderr)
            return
        with own_stream(device):
            running = Running(config, asked, package, device)
            if checkpoint.is_file():
                running.load(checkpoint)
            try:
                running.train(until)
            finally:
                running.save(checkpoint)
            if running.finished:
                rows = running.rows()
                result = {"facts": facts_of(config, asked), "rows": rows}
                write_text(json.dumps(result, indent=1) + "\n", place)
                best = max(rows, key=lambda row: (row["perfect_to"], len(row["known_at"]), row["last"]))
                print(f"{asked['name']}: best {best}", file=sys.stderr)
        del running
        if device.type == "cuda":
            torch.cuda.empty_cache()


def rows_of(config: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """Return what is recorded of all finished stacks; ends the program where one is of other settings."""
    rows: list[dict[str, Any]] = []
    for asked in config["stacks"]:
        place = out / f"{asked['name']}.json"
        if place.is_file():
            found = json.loads(place.read_text(encoding="utf-8"))
            check(place, found, facts_of(config, asked))
            rows += found["rows"]
    return rows


def parsed() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "search.yaml")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / "search", help="folder of rows, table and figure"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="training ends by then; 0: only the table")
    parser.add_argument("--stacks", default="", help="names, with commas; all if none")
    return parser.parse_args()


def main() -> None:
    """Train what is missing, then print the table and draw the figure."""
    arguments = parsed()
    only = [name for name in arguments.stacks.split(",") if name]
    config = load(arguments.config, only)
    with alone(arguments.out):
        rows = rows_of(config, arguments.out)  # before hours of training, if they are of other settings
        if arguments.minutes > 0:
            search(config, arguments.out, arguments.minutes, only)
            rows = rows_of(config, arguments.out)
        text = table(rows)
        write_text(text, arguments.out / "table.md")
        draw(rows, arguments.out / "search.png")
    print(text, end="")


if __name__ == "__main__":
    with reachable():
        main()
