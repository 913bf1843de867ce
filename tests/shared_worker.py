"""One worker of a shared study, as a process: ``shared_worker.py URL GRACE WORKER TRIALS``; prints its trials."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import simulated

from m2gen.db import Database
from m2gen.pipeline import plan
from m2gen.pipeline.tune import TuneRequest, tune
from m2gen.tune import shared
from m2gen.tune.log import Standing
from m2gen.tune.sampler import Sampler
from m2gen.tune.trial import Trial


class Printing:
    """A watcher that prints each trial's origin."""

    def stage(self, text: str) -> None:
        print(f"stage {text}", flush=True)

    def trial(self, trial: Trial, standing: Standing) -> None:
        print(f"{trial.origin} {trial.schedule.slug}", flush=True)

    def details(self, text: str) -> None: ...


def main() -> None:
    """Search until the study has its trials."""
    url, grace, worker, trials = sys.argv[1:5]
    shared.GRACE_SECONDS = shared.open_study.__kwdefaults__["grace"] = float(grace)
    context = replace(simulated.context(), worker=worker)
    request = TuneRequest(
        Database(Path(f"db-{worker}")),
        seconds=60,
        trials=int(trials),
        storage=url,
        sampler=Sampler.RANDOM,
    )
    for tuned in tune(plan("one.yaml"), request, context, Printing()):
        print("winner", tuned.outcome.choice and tuned.outcome.choice.winner.slug, flush=True)


if __name__ == "__main__":
    main()
