"""Finished runs: a file of each while there are some to run, and all of them in one, recall.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from files import write_json
from train import Config, Outcome, config_of

WHICH = ("tasks", "models", "seeds")
"""Values of a config that say which runs there are, and not what they do."""

UNKNOWN = {"device": "unknown device", "torch": "unknown"}
"""What made the runs of a folder that does not say, as one from before folders did."""


@dataclass(frozen=True)
class Machine:
    """What made runs."""

    device: str
    torch: str


@dataclass(frozen=True)
class Results:
    """Finished runs, in the order of the config's tasks, models and seeds."""

    machine: Machine
    config: Config
    runs: tuple[Outcome, ...]

    def of(self, task: str, kind: str) -> list[Outcome]:
        """Return a model's runs of a task, by seed."""
        return [run for run in self.runs if (run.task, run.model) == (task, kind)]


def here() -> Machine:
    """Return this machine."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, Triton's interpreter"
    return Machine(name, torch.__version__)


def in_order(config: Config) -> Iterator[tuple[str, str, int]]:
    """Yield (task, model, seed) of every run as tables have them."""
    for task in config.tasks:
        for kind in config.models:
            yield from ((task, kind, seed) for seed in config.seeds)


def place_of(out: Path, task: str, kind: str, seed: int) -> Path:
    """Return the file of a run."""
    return out / f"{task}_{kind}_{seed}.json"


def missing(config: Config, out: Path) -> list[tuple[str, str, int]]:
    """Return the runs that have no file yet, one seed of everything first."""
    left = [run for run in in_order(config) if not place_of(out, *run).is_file()]
    return sorted(left, key=lambda run: config.seeds.index(run[2]))


def keep(config: Config, out: Path) -> Machine:
    """Note what the folder's runs are of, and return what made them.

    Ends the program where the folder has runs of another config, or where this machine would add to those of another.
    """
    facts = json.loads(json.dumps(asdict(here()) | asdict(config)))
    for name in WHICH:
        del facts[name]
    place = out / "config.json"
    has_runs = any(out.glob("*_*_*.json"))  # a command that ended before its first has left a config alone
    before = UNKNOWN | json.loads(place.read_text(encoding="utf-8")) if has_runs and place.is_file() else facts
    if not missing(config, out):  # a table of finished runs can be made anywhere
        facts |= {name: before[name] for name in UNKNOWN}
    changed = sorted(name for name in {*facts, *before} if facts.get(name) != before.get(name))
    if changed:
        raise SystemExit(
            f"{out} must have runs of this config, but has others: {', '.join(changed)}; give another --out"
        )
    write_json(facts, place)
    return Machine(facts["device"], facts["torch"])


def found(config: Config, out: Path, machine: Machine) -> Results:
    """Return the finished runs of a folder."""
    places = [place for run in in_order(config) if (place := place_of(out, *run)).is_file()]
    return Results(machine, config, tuple(Outcome(**json.loads(x.read_text(encoding="utf-8"))) for x in places))


def write(results: Results, place: Path) -> None:
    """Write all runs into one file, with what they have in common once."""
    common = asdict(results.machine) | {"config": asdict(results.config)}
    write_json(common | {"runs": [asdict(run) for run in results.runs]}, place)


def read(place: Path) -> Results:
    """Return what a file of ``write`` has; one of another form ends the program."""
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
        config = config_of(data["config"])
        given = {(run["task"], run["model"], run["seed"]): Outcome(**run) for run in data["runs"]}
        runs = tuple(given.pop(run) for run in in_order(config) if run in given)
        if given or not runs:
            raise ValueError(f"runs {', '.join(map(str, given)) or 'of none'}")
        for run in runs:
            missed = [str(n) for n in config.evaluate.lengths if not 0 <= run.accuracy[str(n)] <= 1]
            if missed:
                raise ValueError(f"shares that are none at {', '.join(missed)}")
        return Results(Machine(data["device"], data["torch"]), config, runs)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{place} must be a recall.json of finished runs, got {error!r}") from None
