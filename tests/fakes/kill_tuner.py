"""Starts tuners that die at random points: ``kill_tuner.py SERIES KILLS``, in a folder with one.yaml.

A point is right before a call of the system, so that kills fall between any two changes of what is on disk, on a
machine of any speed. A series is killed so often and then let finish, in a cache and a database of its own. Prints a
JSON list of series: after each kill, and at the end, the candidates in the order of the journal's trials, how much had
reached the GPU or the compiler, and the database's records and faults. Everything is imported once, and each tuner is a
fork, so that a hundred of them take seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simulated
from steps import Count, die_at

from m2gen.cache import cache_dir
from m2gen.db import Database
from m2gen.pipeline import plan
from m2gen.pipeline.goals import TuneRequest
from m2gen.pipeline.tune import tune
from m2gen.tune.log import SearchProgress
from m2gen.tune.sampler import Sampler
from m2gen.tune.study import decode_trial
from m2gen.tune.trial import Trial

TRIALS = 40
AFTER = 6
"""Trials, about, within whose calls most kills fall, so that several of them are needed for a whole search."""


class Silent:
    """A watcher that shows nothing, and may note how many calls had been made at each trial."""

    def __init__(self, count: Count | None = None) -> None:
        self._count = count
        self.at: list[int] = []

    def stage(self, text: str) -> None: ...

    def trial(self, trial: Trial, progress: SearchProgress) -> None:
        self.at += [self._count.made] if self._count else []

    def details(self, text: str) -> None: ...


def run(watcher: Silent | None = None) -> None:
    """Tune as ``m2gen tune`` does."""
    request = TuneRequest(Database(Path("db")), seconds=60, trials=TRIALS, sampler=Sampler.RANDOM)
    list(tune(plan("one.yaml", records=()), request, simulated.context(), watcher or Silent()))


def recorded() -> list[str]:
    """Return the candidates whose results are in whole lines of the journal, in their order, as Optuna writes it."""
    found = []
    for path in (cache_dir() / "tune").glob("*.log"):
        for line in map(json.loads, path.read_bytes().split(b"\n")[:-1]):
            result = {**line.get("user_attrs", {}), **line.get("user_attr", {})}.get("m2gen")
            if result is not None:
                found.append(decode_trial(result).schedule.slug)
    return found


def state() -> dict[str, Any]:
    """Return the files on disk."""
    contents = Database(Path("db")).contents()
    return {
        "recorded": recorded(),
        "log": simulated.lines(Path("script.log")),
        "records": [record.schedule.slug for record in contents.records if not record.failure],
        "faults": [str(fault) for fault in contents.faults],
    }


def start(dies_at: int) -> None:
    """Run a tuner in a process of its own, which dies at one of its calls of the system, or is done before."""
    child = os.fork()
    if child == 0:
        die_at(dies_at)
        run()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status


def enter(folder: Path, spec: str) -> None:
    """Make a folder with the spec, and nothing else that a tuner leaves, the current one."""
    folder.mkdir()
    os.chdir(folder)
    Path("one.yaml").write_text(spec, encoding="utf-8")
    simulated.script(Path("script.json").absolute())
    os.environ["M2GEN_CACHE_DIR"] = str(Path("cache").absolute())


@dataclass(frozen=True)
class Calls:
    """The number of system calls that a search makes before its first trial, for each trial, and altogether."""

    before: int
    each: int
    whole: int

    def draw(self, draw: random.Random, part: float) -> int:
        """Return where to kill: while a search begins, or within a few trials; anywhere ``part`` of the way later."""
        end = self.before + AFTER * self.each if part < 0.75 else self.whole
        return draw.randint(*((1, self.before) if draw.random() < 0.5 else (self.before, end)))


def measured() -> Calls:
    """Return the calls of a search that nobody kills."""
    with Count(system=True) as count:
        watcher = Silent(count)
        run(watcher)
    first, last = watcher.at[0], watcher.at[TRIALS - 1]
    return Calls(first, (last - first) // (TRIALS - 1), count.made)


def series(kills: int, draw: random.Random, calls: Calls) -> list[dict[str, Any]]:
    """Kill tuners at random points, then let one finish; return the states in between and at the end."""
    states = []
    for index in range(kills):
        start(calls.draw(draw, index / kills))
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
    calls = measured()
    found = []
    for index in range(int(sys.argv[1])):
        enter(home / f"series{index}", spec)
        found.append(series(int(sys.argv[2]), draw, calls))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
