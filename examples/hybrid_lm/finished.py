"""Results of finished runs in one file, hybrids.json, and back from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plan import Plan

COMMON = ("device", "torch", "text", "plan")
"""Facts that all runs of a comparison share."""
OWN = ("mixers", "kernels")
"""Facts that each run keeps for itself."""


@dataclass(frozen=True)
class Known:
    """Results in a file of ``collected``, each as the run's own file has it, by that file's name."""

    place: Path = Path()
    results: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def collected(plan: Plan, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return all results, with what they have in common once."""
    common = {name: results[0]["facts"][name] for name in COMMON}
    runs = [
        {**{name: x for name, x in result.items() if name != "facts"}, **{name: result["facts"][name] for name in OWN}}
        for result in results
    ]
    sizes = {result["size"]: result["facts"]["size"] for result in results}
    compare = [list(pair) for pair in plan.compare]
    return {**common, "sizes": sizes, "variants": list(plan.variants), "compare": compare, "runs": runs}


def read(place: Path, plan: Plan) -> Known:
    """Return what a file of ``collected`` has of the plan's runs; one of another form ends the program."""
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
        common = {name: data[name] for name in COMMON}
        found = {(run["size"], run["variant"], run["seed"]): run for run in data["runs"]}
        results = {}
        for run in plan.runs():
            if result := found.get((run.size_name, run.variant, run.seed)):
                # A file from before runs had their mixers is taken to be of this plan's.
                mixers = result.pop("mixers", list(run.mixers))
                own = {"mixers": mixers, "kernels": result.pop("kernels", data.get("kernels", "")), "seed": run.seed}
                facts = {**common, "size": data["sizes"][run.size_name], **own}
                results[run.file_name] = {**result, "facts": facts}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{place} must be a hybrids.json of finished runs, got {error!r}") from None
    return Known(place, results)
