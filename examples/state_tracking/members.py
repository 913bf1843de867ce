"""The models of a stack of the search, and what its results depend on."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from many import Plan
from settings import config_of, readable

SHAPE = ("rows", "columns", "heads", "width", "layers", "activation", "bias", "answers", "batch", "tokens")
"""What all models of a stack have in common."""
START = ("forget", "weights", "spin", "scale", "embed")
"""What a model begins with."""
PLAN = tuple(field.name for field in fields(Plan))
APART = ("name", "seconds", "variants", "group", "total")
"""What a stack has beside settings of its models."""
ASKED = {"length", "words", "at_once"}
"""What ``evaluate`` of a config has."""
LATER = ("seconds", "evaluate")
"""Facts of a stack that training does not depend on until it is finished."""


@dataclass(frozen=True)
class Member:
    """One model of a stack: what its variant changes, all its settings, and its seed."""

    changes: dict[str, Any]
    settings: dict[str, Any]
    seed: int

    @property
    def plan(self) -> Plan:
        """How it is trained."""
        values = {name: self.settings[name] for name in PLAN}
        return Plan(**values | {"stages": tuple((letters, length) for letters, length in values["stages"])})


def load(path: Path, only: list[str]) -> dict[str, Any]:
    """Read a config; what one of its stacks would fail with, or a name in ``only`` of none, ends the program."""
    config = config_of(path, {"package", "total", "group", "evaluate", "defaults", "stacks"}, ("curricula",))
    with readable(path, ""):
        names = [asked["name"] for asked in config["stacks"]]
        for asked in config["stacks"]:
            facts_of(config, asked)
            for member in members_of(config, asked):
                member.plan  # noqa: B018
        if wrong := sorted(ASKED ^ config["evaluate"].keys()):
            raise ValueError(f"evaluate must give {', '.join(sorted(ASKED))}; see {', '.join(wrong)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:  # they name the files of stacks
        raise SystemExit(f"{path}: stacks must have a name each, got {', '.join(twice)} more than once")
    unknown = sorted({*only} - {*names})
    if unknown:
        raise SystemExit(f"--stacks must be of {', '.join(names)}, got {', '.join(unknown)}")
    return config


def settings_of(config: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Return what a stack's models have in common unless their variants change it."""
    return config["defaults"] | {name: value for name, value in asked.items() if name not in APART}


def members_of(config: dict[str, Any], asked: dict[str, Any]) -> list[Member]:
    """Return a stack's models: every variant with as many seeds as there is room for."""
    settings = settings_of(config, asked)
    unknown = sorted(set().union(settings, *asked["variants"]) - {*SHAPE, *START, *PLAN})
    fixed = sorted(set().union(*asked["variants"]) & {*SHAPE})
    if unknown or fixed:
        raise SystemExit(
            f"stack {asked['name']}: settings must be known, and one shape's; see {', '.join(unknown + fixed)}"
        )
    total, each = asked.get("total", config["total"]), settings["heads"] * len(asked["variants"])
    if not 0 < each <= total:
        raise SystemExit(f"stack {asked['name']}: total must have room for a model of each variant, got {total}")
    seeds = total // settings["heads"] // len(asked["variants"])
    return [Member(changes, settings | changes, seed) for changes in asked["variants"] for seed in range(seeds)]


def facts_of(config: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Return what the results of a stack depend on, as JSON has it."""
    own = {"group": asked.get("group", config["group"]), "total": asked.get("total", config["total"])}
    facts = settings_of(config, asked) | own | {"variants": asked["variants"], "seconds": asked["seconds"]}
    return dict(json.loads(json.dumps(facts | {"evaluate": config["evaluate"]})))


def check(place: Path, found: Any, facts: dict[str, Any]) -> None:
    """End the program unless a file is of these facts; one that has none is of others."""
    kept = found.get("facts") if isinstance(found, dict) else None
    changed = sorted(name for name in facts if (kept or {}).get(name) != facts[name])
    if changed:
        said = f"has another {', '.join(changed)}" if kept else "does not say of which it is"
        raise SystemExit(f"{place} must be of this config, but {said}; give another --out")
