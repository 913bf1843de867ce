"""The runs that learn.py is asked for: the recipes of a config, and what each of them comes to."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from settings import config_of, readable
from streams import Plan
from tracker import Start
from words import elements_of

SHAPE = ("group", "layers", "heads", "columns", "repeats", "answers", "norm", "residual", "keep_gates")
"""Settings of layers and their answers; all others are a ``Plan``'s or a ``Start``'s."""
CHOICES = {"answers": ("points", "element"), "weights": ("rotation", "identity", "automaton")}
"""Settings that are words, and which."""
ASKED = {"words", "length"}
"""What ``evaluate`` of a config has."""


@dataclass(frozen=True)
class Run:
    """One layer to be trained: its recipe's name, what that changes, all settings, and the seed."""

    recipe: str
    changes: dict[str, Any]
    settings: dict[str, Any]
    seed: int

    @property
    def name(self) -> str:
        """The run's name, which its files have."""
        return f"{self.recipe}_{self.seed}"

    @property
    def plan(self) -> Plan:
        """How it is trained."""
        values = {one.name: self.settings[one.name] for one in fields(Plan)}
        return Plan(**values | {"letters": tuple(values["letters"])})

    @property
    def start(self) -> Start:
        """What it begins with."""
        return Start(**{one.name: self.settings[one.name] for one in fields(Start)})


def runs_of(config: dict[str, Any], only: set[str]) -> list[Run]:
    """Return the runs of the recipes named in ``only``, or of all; ends the program where settings are unknown."""
    known = {*SHAPE, *(one.name for one in (*fields(Plan), *fields(Start)))}
    every = [recipe["name"] for recipe in config["recipes"]]
    names = {*every}
    if len(names) < len(every):  # they name the files of runs
        twice = ", ".join(sorted(name for name in names if every.count(name) > 1))
        raise SystemExit(f"recipes must have a name each, got {twice} more than once")
    if only - names:
        raise SystemExit(f"--recipes must be of {', '.join(sorted(names))}, got {', '.join(sorted(only - names))}")
    runs = []
    for recipe in config["recipes"]:
        changes = {key: value for key, value in recipe.items() if key not in ("name", "seeds")}
        settings = config["defaults"] | changes
        if {*settings} != known:
            raise SystemExit(f"recipe {recipe['name']}: see {', '.join(sorted({*settings} ^ known))}")
        if not only or recipe["name"] in only:
            runs += [Run(recipe["name"], changes, settings, seed) for seed in recipe["seeds"]]
    return runs


def check(run: Run) -> None:
    """Raise what a run would with settings of no sense; a group that is none ends the program."""
    elements_of(run.settings["group"])
    if not run.plan.letters:
        raise ValueError("letters must have a stage, got none")
    if not 0 < run.start.forget < 1:
        raise ValueError(f"forget must be between 0 and 1, got {run.start.forget}")
    for name, choices in CHOICES.items():
        if run.settings[name] not in choices:
            raise ValueError(f"{name} must be of {', '.join(choices)}, got {run.settings[name]!r}")
    for name in ("layers", "heads", "repeats", "streams", "segment"):
        if run.settings[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {run.settings[name]}")


def asked_of(place: Path, only: set[str]) -> tuple[dict[str, Any], list[Run]]:
    """Return the config and its runs; what one of them would fail with ends the program before any trains."""
    config = config_of(place, {"package", "evaluate", "defaults", "recipes"})
    with readable(place, ""):
        runs = runs_of(config, only)
        wrong = sorted(config["evaluate"].keys() ^ ASKED)
        for run in runs:
            check(run)
    if wrong:
        raise SystemExit(f"{place}: evaluate must give {', '.join(sorted(ASKED))}; see {', '.join(wrong)}")
    return config, runs
