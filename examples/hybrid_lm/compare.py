"""Whether the model trains on kernels as it does on the reference backend, and goes on as if never interrupted."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import mean

import data
import torch
import yaml
from files import write_json, write_text
from loop import device_at_hand, draw, facts_of, steps, train
from model import Config, Trainer
from report import Difference, paired

HERE = Path(__file__).resolve().parent
LAST = 20
"""Steps at the end whose mean loss is shown, and judged."""
UNSEEN = 1e-3
"""Nats a byte by which no difference counts: rounding, where runs are as good as equal."""


@dataclass(frozen=True)
class Outcome:
    """Losses of every run, step by step: kernels and reference of each seed, and of the first seed again."""

    kernels: dict[int, list[float]]
    reference: dict[int, list[float]]
    again: list[float]
    whole: list[float]
    resumed: list[float]

    @property
    def between_backends(self) -> float:
        """How far kernels and reference of one seed are apart, on average over steps and seeds."""
        return mean(apart(self.kernels[seed], self.reference[seed]) for seed in self.kernels)

    @property
    def between_repeats(self) -> float:
        """How far two runs of the kernels with one seed are apart."""
        return apart(self.kernels[next(iter(self.kernels))], self.again)

    @property
    def between_seeds(self) -> float:
        """How far runs of the reference with two seeds are apart, on average over steps and pairs of seeds."""
        return mean(apart(one, other) for one, other in combinations(self.reference.values(), 2))

    @property
    def at_the_end(self) -> Difference:
        """What kernels have more than the reference at the end, on the same batches: over seeds, with its interval."""
        return paired(*([end(run) for run in runs.values()] for runs in (self.kernels, self.reference)))

    @property
    def repeats_at_the_end(self) -> float:
        """How far two runs of the kernels with one seed are apart at the end."""
        return abs(end(self.kernels[next(iter(self.kernels))]) - end(self.again))

    @property
    def trains_alike(self) -> bool:
        """Whether the backends are closer to each other, step by step, than seeds and their batches are."""
        return self.between_backends < self.between_seeds

    @property
    def ends_alike(self) -> bool:
        """Whether neither backend is lower at the end by more than chance makes.

        Chance is the larger of two: the 95 % interval of the difference by its spread over seeds, which holds what a
        seed and its batches do to both backends alike out of it, and what two runs of one seed are apart.
        """
        found = self.at_the_end
        return abs(found.mean) <= max(found.half, self.repeats_at_the_end, UNSEEN)

    @property
    def resumes(self) -> bool:
        """Whether the interrupted run has the losses of the other, to the last bit."""
        return self.whole == self.resumed


def end(losses: list[float]) -> float:
    """Return the mean of a run's last losses."""
    return mean(losses[-LAST:])


def apart(one: list[float], other: list[float]) -> float:
    """Return the mean |difference| of two runs' losses."""
    return mean(abs(a - b) for a, b in zip(one, other, strict=True))


def curve(config: Config, name: str, until: int) -> list[float]:
    """Train anew up to step ``until`` and return the losses."""
    began = time.perf_counter()
    trainer = Trainer(config, device_at_hand())
    losses = torch.stack(list(steps(trainer, data.read(config.text), until))).tolist()
    print(f"{name}: loss {losses[-1]:.4f} at step {until}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return [float(loss) for loss in losses]


def resumed(config: Config) -> list[float]:
    """Return the losses of a run that stops between two checkpoints and goes on in another process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(config, folder, until=config.steps // 2 + 1)
        (folder / "config.yaml").write_text(yaml.safe_dump(facts_of(config)), encoding="utf-8")
        command = [sys.executable, str(HERE / "run.py"), "train", "--config", str(folder / "config.yaml")]
        subprocess.run([*command, "--out", name], check=True, stdout=subprocess.DEVNULL)
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        return [float(loss) for loss in saved["losses"]]


@dataclass(frozen=True)
class Kept:
    """Losses of finished runs, a file each: a command that is called again goes on where it was."""

    folder: Path

    def run(self, name: str, config: Config, train_anew: Callable[[], list[float]]) -> list[float]:
        """Return a run's losses, from its file where config, text, GPU, torch and kernels are the same."""
        path = self.folder / f"{name.replace(', ', ' ').replace(' ', '_')}.json"
        facts = {**setting(config), "python": sys.version, "kernels": kernels_of(config)}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        if isinstance(found, dict) and {key: found.get(key) for key in facts} == json.loads(json.dumps(facts)):
            print(f"{name}: from {path}", file=sys.stderr)
            return [float(loss) for loss in found["losses"]]
        losses = train_anew()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json({**facts, "losses": losses}, path)
        return losses


def device_name() -> str:
    """Name what runs the kernels."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, Triton's interpreter"


def setting(config: Config) -> dict[str, object]:
    """Return what losses are of."""
    digest = data.digest_of(data.read(config.text))
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "config": facts_of(config),
        "sha256_of_text": digest,
    }


def kernels_of(config: Config) -> str:
    """Return 12 hex digits that change with the package of the config's layers."""
    found = importlib.util.find_spec(config.package)
    manifest = Path(str(found.origin)).parent / "MANIFEST.json" if found else None
    return hashlib.sha256(manifest.read_bytes()).hexdigest()[:12] if manifest else ""


def measured(config: Config, kept: Kept) -> Outcome:
    """Train every run that is not kept."""
    choice = config.compare
    kernels = replace(config, seq=choice.seq, backend="kernels")
    reference = replace(kernels, backend="reference", compile=False)  # compiled, its steps are unrolled: minutes
    first = replace(kernels, seed=choice.seeds[0])
    # Half of the steps is a checkpoint, and the step after it is lost.
    exact = replace(first, deterministic=True, steps=choice.steps, save_every=max(1, choice.steps // 2))

    def trained(config: Config, name: str) -> list[float]:
        return kept.run(name, config, lambda: curve(config, name, choice.steps))

    return Outcome(
        {seed: trained(replace(kernels, seed=seed), f"kernels, seed {seed}") for seed in choice.seeds},
        {seed: trained(replace(reference, seed=seed), f"reference, seed {seed}") for seed in choice.seeds},
        trained(first, f"kernels, seed {first.seed} again"),
        trained(exact, "deterministic, in one piece"),
        kept.run("deterministic, resumed", exact, lambda: resumed(exact)),
    )


def table(config: Config, outcome: Outcome) -> str:
    """Return what was measured, and whether it is as it should be."""
    seeds = ", ".join(str(seed) for seed in outcome.kernels)
    ends = [
        f"| {name}, seeds {seeds} | " + ", ".join(f"{end(run):.4f}" for run in runs.values()) + " |"
        for name, runs in (("kernels", outcome.kernels), ("reference", outcome.reference))
    ]
    difference = outcome.at_the_end
    rows = [
        f"| mean loss of the last {min(LAST, config.compare.steps)} of {config.compare.steps} steps | |",
        "| --- | --- |",
        *ends,
        f"| kernels less reference, mean over seeds, 95 % interval | {difference.mean:+.4f} ± {difference.half:.4f} |",
        f"| kernels twice, one seed | {outcome.repeats_at_the_end:.4f} |",
        "| **mean difference of the losses of a step** | |",
        f"| kernels and reference, one seed | {outcome.between_backends:.3g} |",
        f"| kernels twice, one seed | {outcome.between_repeats:.3g} |",
        f"| reference, two seeds | {outcome.between_seeds:.3g} |",
        f"| in one piece and interrupted, deterministic | {apart(outcome.whole, outcome.resumed):.3g} |",
    ]
    words = {True: "yes", False: "NO"}
    verdicts = [
        f"within seed noise of the reference: {words[outcome.trains_alike]}",
        f"as low at the end as the reference: {words[outcome.ends_alike]}",
        f"the same losses after an interruption: {words[outcome.resumes]}",
    ]
    return "\n".join([*rows, "", *verdicts]) + "\n"


def compare(config: Config, out: Path) -> None:
    """Write and print the comparison; the exit status is 1 unless all is as it should be."""
    if len(set(config.compare.seeds)) < 2 or config.compare.steps < 4:  # fewer leave nothing to go on with
        raise SystemExit(f"compare must have at least two seeds and four steps, got {config.compare}")
    outcome = measured(config, Kept(out / "runs"))
    runs = {"kernels": outcome.kernels, "reference": outcome.reference}
    runs |= {"again": outcome.again, "whole": outcome.whole, "resumed": outcome.resumed}
    write_json({**setting(config), "losses": runs}, out / "compare.json")
    curves = {}
    for name, style, losses in (("kernels", "-", outcome.kernels), ("reference", ":", outcome.reference)):
        for i, (seed, run) in enumerate(losses.items()):
            curves[f"{name}, seed {seed}"] = (run, f"C{i}{style}")
    draw(curves, out / "compare.png")
    report = f"{device_name()}, torch {torch.__version__}, {config.dtype}\n\n{table(config, outcome)}"
    write_text(report, out / "compare.md")
    print(report, end="")
    if not (outcome.trains_alike and outcome.ends_alike and outcome.resumes):
        raise SystemExit(1)
