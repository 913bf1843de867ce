"""One worker of a shared study, as a process: ``shared_worker.py URL WORKER TRIALS LAST``; prints trials.

Without a URL it shares the journal in the cache, as tuners on two GPUs of one host do; workers of a database are each
on a host of its own.

After each of ``MEETINGS`` trials of its own it says so and waits for a line, so that who is slow to start is waited
for, and who is fast does not end before another dies. It dies right after its ``LAST`` one, with the claims that it
has then. Whoever waits is silent, and keeps its claims for as long as that may take on a busy machine.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
from dataclasses import replace
from pathlib import Path

import simulated

from m2gen.db import Database
from m2gen.pipeline import plan
from m2gen.pipeline.goals import TuneRequest
from m2gen.pipeline.tune import tune
from m2gen.tune import storage
from m2gen.tune.log import SearchProgress
from m2gen.tune.sampler import Sampler
from m2gen.tune.trial import Trial

MEETINGS = (4, 20)
MET = "met"
GRACE_SECONDS = 3600
"""Silence after which a worker's claims are another's; tests make those of the dead older than that."""


class Printing:
    """A watcher that prints each trial's origin, and knows when to wait and when to die."""

    def __init__(self, worker: str, last: int) -> None:
        self._worker, self._last, self._own = worker, last, 0

    def stage(self, text: str) -> None:
        print(f"stage {text}", flush=True)

    def trial(self, trial: Trial, progress: SearchProgress) -> None:
        print(f"{trial.origin} {trial.schedule.slug}", flush=True)
        self._own += trial.worker == self._worker
        if trial.worker == self._worker and self._own in MEETINGS:
            print(MET, flush=True)
            sys.stdin.readline()
        if self._own == self._last:
            os.kill(os.getpid(), signal.SIGKILL)

    def details(self, text: str) -> None: ...


def main() -> None:
    """Search until the study has its trials."""
    url, worker, trials, last = sys.argv[1:5]
    storage.GRACE_SECONDS = GRACE_SECONDS
    if url:
        platform.node = lambda: f"host of {worker}"
    context = replace(simulated.context(), worker=worker)
    request = TuneRequest(
        Database(Path(f"db-{worker}")),
        seconds=60,
        trials=int(trials),
        storage=url or None,
        sampler=Sampler.RANDOM,
    )
    for tuned in tune(plan("one.yaml"), request, context, Printing(worker, int(last))):
        print("winner", tuned.outcome.choice and tuned.outcome.choice.winner.slug, flush=True)


if __name__ == "__main__":
    main()
