"""Learn the default schedules of an arch from trials: a small tree over problems, with a few recipes at each leaf.

The times of a forward and of a backward add up, so each pair of a forward and a backward that were timed in any trials
of one workload counts as timed. A recipe is judged by how much longer it takes than the best of its workload. Leaves
are split, by the feature and threshold that help most, until every workload is within ``CLOSE`` of its best.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from m2gen.schedule import Schedule, default
from m2gen.schedule.learned import Kernels, serving
from m2gen.schedule.recipes import Recipe
from m2gen.tune.lessons import UNKNOWN, Lesson, written

CLOSE = 0.03
"""Fraction of time over the best of every workload below which a leaf is not split."""
GAIN = 0.05
"""Least sum of logarithms that a split must save."""
MOST_RECIPES = 4
"""Most recipes of a leaf: each serves problems that those before it cannot."""


def fit(lessons: Sequence[Lesson]) -> dict[str, Any]:
    """Return the trees that serve lessons best, one for each kind of kernels, as JSON values."""
    found = {}
    for kernels in Kernels:
        same = [lesson for lesson in lessons if lesson.at.kernels is kernels]
        if same:
            found[str(kernels)] = _grow(same, _recipes(same))
    return found


def _recipes(lessons: Iterable[Lesson]) -> list[Recipe]:
    """Return every recipe that was timed, in a fixed order."""
    return sorted({Recipe.of(t.schedule, each.at.variant) for each in lessons for t in each.trials}, key=repr)


def _grow(lessons: Sequence[Lesson], recipes: Sequence[Recipe]) -> dict[str, Any]:
    return _grown(lessons, recipes)[0]


def _grown(lessons: Sequence[Lesson], recipes: Sequence[Recipe]) -> tuple[dict[str, Any], float]:
    """Return a tree and what lessons cost with it: a leaf, unless branches are better, or become so further down."""
    chosen, costs = _choose(lessons, recipes)
    leaf = _leaf(lessons, chosen), sum(costs)
    splits = list(_splits(lessons))
    if max(costs) <= math.log1p(CLOSE) or not splits:
        return leaf

    def total(split: tuple[str, float]) -> float:
        return sum(sum(_choose(side, recipes)[1]) for side in _sides(lessons, *split))

    feature, at_most = min(splits, key=total)
    (yes, one), (no, other) = (_grown(side, recipes) for side in _sides(lessons, feature, at_most))
    if one + other > leaf[1] - GAIN:
        return leaf
    return {"feature": feature, "at most": at_most, "yes": yes, "no": no}, one + other


def _leaf(lessons: Sequence[Lesson], chosen: Sequence[Recipe]) -> dict[str, Any]:
    return {"recipes": [recipe.written for recipe in chosen], "of": [lesson.at.name for lesson in lessons]}


def _splits(lessons: Sequence[Lesson]) -> Iterator[tuple[str, float]]:
    for feature in lessons[0].at.having:
        values = sorted({lesson.at.having[feature] for lesson in lessons})
        yield from ((feature, _between(low, high)) for low, high in pairwise(values))


def _between(low: float, high: float) -> float:
    """Return a threshold halfway by ratio, in two digits, as nothing is known in between."""
    middle = float(f"{math.sqrt(low * high):.2g}")
    return middle if low <= middle < high else low


def _sides(lessons: Sequence[Lesson], feature: str, at_most: float) -> tuple[list[Lesson], list[Lesson]]:
    low = [lesson for lesson in lessons if lesson.at.having[feature] <= at_most]
    return low, [lesson for lesson in lessons if lesson not in low]


def _choose(lessons: Sequence[Lesson], recipes: Sequence[Recipe]) -> tuple[list[Recipe], list[float]]:
    """Return the recipes that serve lessons best, and what each lesson then costs.

    The first is the one of least cost altogether, the next the one of least cost for those that the first cannot serve.
    """
    chosen: list[Recipe] = []
    left = list(lessons)
    costs = dict.fromkeys(lessons, UNKNOWN)
    while left and len(chosen) < MOST_RECIPES:
        recipe = min(recipes, key=lambda r: sum(UNKNOWN if (c := each.cost(r)) is None else c for each in left))
        served = {each: cost for each in left if (cost := each.cost(recipe)) is not None}
        if not served:
            break
        chosen.append(recipe)
        costs |= served
        left = [each for each in left if each not in served]
    return chosen, list(costs.values())


def rules_of(lessons: Sequence[Lesson]) -> dict[str, Any]:
    """Return the rule of every arch that lessons are of, with what it was learned from."""
    found = {}
    for arch in dict.fromkeys(lesson.at.device.arch for lesson in lessons):
        same = [lesson for lesson in lessons if lesson.at.device.arch == arch]
        found[arch] = {
            "devices": sorted({lesson.at.device.name for lesson in same}),
            "workloads": len(same),
            "trials": sum(len(lesson.trials) for lesson in same),
            "sha256": hashlib.sha256(written(same).encode()).hexdigest(),
            "trees": fit(same),
        }
    return found


def text_of(rules: dict[str, Any]) -> str:
    """Return the content of ``learned.json``."""
    return json.dumps(rules, indent=1) + "\n"


@dataclass(frozen=True)
class RuleScore:
    """What a rule's choice takes beside the best of a workload; None where it was not timed."""

    lesson: Lesson
    choice: Schedule
    """The schedule of the rule that is learned without the workload's variant, or the family's where that has none."""
    families: float | None
    """The default of the preferred family, without a rule."""
    rule: float | None
    without: float | None
    """``choice``."""


def judged(lessons: Sequence[Lesson]) -> list[RuleScore]:
    """Leave each workload's variant out in turn, and return how its choice does."""
    rules = rules_of(lessons)
    return [_judge(lesson, lessons, rules[lesson.at.device.arch]["trees"]) for lesson in lessons]


def _judge(lesson: Lesson, lessons: Sequence[Lesson], trees: dict[str, Any]) -> RuleScore:
    at = lesson.at
    usual = default(at.variant, at.device)
    rule = next(serving(trees[at.kernels], at.variant, at.device, at.bucket), usual)
    without = left_out(lessons, lesson) or usual
    times = (lesson.ms(schedule) for schedule in (usual, rule, without))
    parts = [None if ms is None else ms / lesson.best_ms for ms in times]
    return RuleScore(lesson, without, *parts)


def left_out(lessons: Sequence[Lesson], lesson: Lesson) -> Schedule | None:
    """Return the schedule for a lesson by its arch's rule, learned without its variant; None where that has none."""
    at = lesson.at
    same = [other for other in lessons if other.at.device.arch == at.device.arch]
    tree = fit([other for other in same if other.at.variant != at.variant]).get(str(at.kernels))
    return next(serving(tree, at.variant, at.device, at.bucket), None) if tree else None
