"""Starts tuners and kills them at random points: ``kill_tuner.py SERIES KILLS``, in a folder with one.yaml.

A series is killed so often and then let finish, in a cache and a database of its own. Prints a JSON list of series:
after each kill, and at the end, the candidates in the order of the journal's trials, how much had reached the GPU or
the compiler, and the database's records and faults. Everything is imported once, and each tuner is a fork, so that a
hundred of them take seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import simulated

from m2gen.cache import cache_dir
from m2gen.db import Database
from m2gen.pipeline import plan
from m2gen.pipeline.tune import TuneRequest, tune
from m2gen.tune.journal import decode_trial
from m2gen.tune.log import Standing
from m2gen.tune.sampler import Sampler
from m2gen.tune.trial import Trial

TRIALS = 40
EARLY = 0.5
"""Half of the kills come at a time up to this part of what a search takes here, which its start takes most of; the
others after some more trials."""
MORE = 3


class Silent:
    """A watcher that shows nothing."""

    def stage(self, text: str) -> None: ...
    def trial(self, trial: Trial, standing: Standing) -> None: ...
    def details(self, text: str) -> None: ...


def run() -> None:
    """Tune as ``m2gen tune`` does."""
    request = TuneRequest(Database(Path("db")), seconds=60, trials=TRIALS, sampler=Sampler.RANDOM)
    list(tune(plan("one.yaml", records=()), request, simulated.context(), Silent()))


def recorded() -> list[str]:
    """Return the candidates whose trials are whole lines of the journal."""
    found = []
    for path in (cache_dir() / "tune").glob("*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            trial = json.loads(line).get("trial")
            if trial is not None:
                found.append(decode_trial(trial).schedule.slug)
    return found


def state() -> dict[str, Any]:
    """Return what is on disk."""
    contents = Database(Path("db")).contents()
    return {
        "recorded": recorded(),
        "log": simulated.lines(Path("script.log")),
        "records": [record.schedule.slug for record in contents.records if not record.failure],
        "faults": [str(fault) for fault in contents.faults],
    }


def start() -> int:
    """Start a tuner in a process of its own."""
    child = os.fork()
    if child == 0:
        run()
        os._exit(0)
    return child


def enter(folder: Path, spec: str) -> None:
    """Make a folder with the spec, and nothing else that a tuner leaves, the current one."""
    folder.mkdir()
    os.chdir(folder)
    Path("one.yaml").write_text(spec, encoding="utf-8")
    simulated.script(Path("script.json").absolute(), sleep=0.0005)
    os.environ["M2GEN_CACHE_DIR"] = str(Path("cache").absolute())


def wait_for_more(child: int, lines: int) -> None:
    """Wait until the journal has so many more lines, or the tuner is about to end."""
    journals = cache_dir() / "tune"

    def written() -> int:
        return sum(path.read_bytes().count(b"\n") for path in journals.glob("*.jsonl"))

    before = written()
    while written() < before + lines and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.0005)


def series(kills: int, draw: random.Random, seconds: float) -> list[dict[str, Any]]:
    """Kill tuners at random points, then let one finish; return the states in between and at the end."""
    states = []
    for _ in range(kills):
        child = start()
        if draw.random() < 0.5:
            time.sleep(draw.uniform(0, seconds))
        else:
            wait_for_more(child, draw.randint(1, MORE))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        states.append(state())
    run()
    return [*states, state()]


def main() -> None:
    """Run every series in a folder of its own."""
    draw, home = random.Random(0), Path.cwd()
    spec = Path("one.yaml").read_text(encoding="utf-8")
    enter(home / "imports", spec)
    run()
    enter(home / "whole", spec)
    begin = time.monotonic()
    os.waitpid(start(), 0)
    seconds = EARLY * (time.monotonic() - begin)
    found = []
    for index in range(int(sys.argv[1])):
        enter(home / f"series{index}", spec)
        found.append(series(int(sys.argv[2]), draw, seconds))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
