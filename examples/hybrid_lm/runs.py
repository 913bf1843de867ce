"""One run of the comparison: trained with its validation, interrupted and gone on with."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import corpus
import torch
from captured import CapturedTrainer, own_stream
from compare import device_name, kernels_of
from corpus import Text
from files import store, write_json
from finished import Known
from loop import device_at_hand
from model import Trainer
from plan import Run, hidden_of, parameters_of, state_of

WARM_UP = 3
"""Steps of a model that is thrown away, in which kernels are compiled."""


@dataclass
class Clock:
    """The time that a command has; a signal may end it sooner."""

    minutes: float | None
    began: float = field(default_factory=time.monotonic)
    stopped: bool = False

    def stop(self, *_: object) -> None:
        """End the time now."""
        self.stopped = True

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        late = self.minutes is not None and time.monotonic() - self.began > 60 * self.minutes
        return self.stopped or late


@dataclass
class Progress:
    """What a run has measured: (step, seconds of training, mean training loss, validation loss) in nats a byte.

    ``recent`` are the training losses since the curve's last point.
    """

    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    curve: list[tuple[int, float, float, float]] = field(default_factory=list)


class Runner:
    """Runs that share a text, a folder, a clock, and the kernels that this process has compiled."""

    def __init__(self, text: Text, out: Path, clock: Clock, known: Known) -> None:
        self.device = device_at_hand()
        self.facts, self.text = text.facts, text.to(self.device)
        self.out, self.clock, self.known = out, clock, known
        self._warm: set[tuple[str, str]] = set()

    def facts_of(self, run: Run) -> dict[str, Any]:
        """Return what the results of a run depend on."""
        plan = asdict(run.plan)
        for name in ("variants", "compare", "sizes", "save_every"):  # which runs there are, and not what they do
            del plan[name]
        size = {name: x for name, x in asdict(run.size).items() if name not in ("seeds", "variants")}
        versions = {"device": device_name(), "torch": torch.__version__, "kernels": kernels_of(run.config)}
        facts = {**versions, "text": asdict(self.facts), "plan": plan, "size": size, "mixers": run.mixers}
        return dict(json.loads(json.dumps({**facts, "seed": run.seed})))

    def finished(self, run: Run) -> dict[str, Any] | None:
        """Return the results of a run that is done, or None; those of other facts end the program.

        Those of a run that is known from another machine get a file of their own here, which counts from then on.
        """
        place = self.out / "runs" / f"{run.file_name}.json"
        if place.is_file():
            found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
            self._check(place, found["facts"], run)
            return found
        known = self.known.results.get(run.file_name)
        if known is not None:  # checked before it is written: a file of other facts would stay in the way
            self._check(self.known.place, known["facts"], run, "--known")
            write_json(known, place)
        return known

    def _check(self, place: Path, found: dict[str, Any], run: Run, option: str = "--out") -> None:
        wanted = self.facts_of(run)
        del wanted["kernels"]  # later builds train alike: each is checked against float64
        changed = ", ".join(name for name in wanted if found.get(name) != wanted[name])
        if changed:
            raise SystemExit(f"{place} must be of this plan, but has another {changed}; give another {option}")

    def train(self, run: Run) -> dict[str, Any] | None:
        """Train a run to its end, from its checkpoint where there is one; None where the clock ended it before."""
        with own_stream(self.device):
            return self._train(run)

    def _train(self, run: Run) -> dict[str, Any] | None:
        self._warm_up(run)
        trainer, progress = CapturedTrainer(run.config, self.device, run.model), Progress()
        place = self.out / "checkpoints" / f"{run.file_name}.pt"
        if place.is_file():
            saved = torch.load(place, map_location=self.device, weights_only=True)
            self._check(place, saved["facts"], run)
            trainer.restore(saved["trainer"])
            progress = Progress(saved["seconds"], saved["recent"], [tuple(point) for point in saved["curve"]])
            print(f"{run.file_name}: going on at step {trainer.done}", file=sys.stderr)
        for _ in self._marks(run, trainer, progress):
            over, done = self.clock.over, trainer.done == run.plan.steps
            if not done and (over or trainer.done % run.plan.save_every == 0):
                self._save(place, run, trainer, progress)
            if over and not done:
                return None
        result = self._result(run, trainer, progress)
        write_json(result, self.out / "runs" / f"{run.file_name}.json")
        place.unlink(missing_ok=True)
        return result

    def _marks(self, run: Run, trainer: Trainer, progress: Progress) -> Iterator[None]:
        """Train; yield at each point of the curve, and where the clock ends between two."""
        plan = run.plan
        while trainer.done < plan.steps:
            until = min(plan.steps, (trainer.done // plan.evaluate_every + 1) * plan.evaluate_every)
            began, losses = self._now(), []
            while trainer.done < until and not self.clock.over:
                rows = corpus.batch(self.text.train, plan.batch, plan.seq, run.seed, trainer.done)
                losses.append(trainer.step(*rows))
            progress.seconds += self._now() - began
            progress.recent += torch.stack(losses).tolist() if losses else []
            if trainer.done == until:
                nats = self.evaluate(run, trainer, plan.validation.curve)
                progress.curve.append((until, progress.seconds, mean(progress.recent), nats))
                rate = until * plan.batch * plan.seq / progress.seconds
                print(f"{run.file_name}: step {until}, {nats:.4f} nats a byte, {rate:,.0f} tokens/s", file=sys.stderr)
                progress.recent = []
            yield

    def evaluate(self, run: Run, trainer: Trainer, limit: int) -> float:
        """Return the mean loss over at most ``limit`` bytes of the validation text, in nats a byte."""
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for tokens, following in corpus.windows(self.text.validation, limit, run.plan.batch, run.plan.seq):
            total += trainer.judged(tokens, following)
            count += following.numel()
        return total.item() / count

    def _warm_up(self, run: Run) -> None:
        """Compile what a model of this kind needs, outside the time of any run."""
        kind = (run.size_name, run.variant)
        if kind in self._warm or self.device.type == "cpu":
            return
        self._warm.add(kind)
        trainer = CapturedTrainer(run.config, self.device, run.model)
        for step in range(WARM_UP):
            trainer.step(*corpus.batch(self.text.train, run.plan.batch, run.plan.seq, run.seed, step))
        self.evaluate(run, trainer, run.plan.batch * run.plan.seq)

    def _save(self, place: Path, run: Run, trainer: Trainer, progress: Progress) -> None:
        saved = {"facts": self.facts_of(run), "trainer": trainer.state(), **vars(progress)}
        store(place, lambda path: torch.save(saved, path))

    def _result(self, run: Run, trainer: Trainer, progress: Progress) -> dict[str, Any]:
        """Return what is kept of a finished run."""
        began = self._now()
        final = self.evaluate(run, trainer, run.plan.validation.final)
        judged = self._now() - began
        return {
            "size": run.size_name,
            "variant": run.variant,
            "seed": run.seed,
            "parameters": parameters_of(trainer.model),
            "states": {kind: state_of(kind, run) for kind in dict.fromkeys(run.mixers)},
            "mlp": hidden_of(run),
            "tokens_a_step": run.plan.batch * run.plan.seq,
            "seconds": progress.seconds,
            "evaluation_seconds": judged,
            "curve": progress.curve,
            "final": final,
            "facts": self.facts_of(run),
        }

    def _now(self) -> float:
        """Return the seconds of a clock, after the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
