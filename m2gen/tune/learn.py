"""Learn the default schedules of an arch from trials: a small tree over problems, with a few recipes at each leaf.

The times of a forward and of a backward add up, so each pair of a forward and a backward that were timed in any trials
of one workload counts as timed. A recipe is judged by how much longer it takes than the best of its workload. The tree
is the cheapest that there is, where a split costs ``GAIN``; leaves that serve all within ``CLOSE`` are not split.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
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
"""What a split costs: the sum of logarithms that it must save."""
DIGITS = 6
"""Digits of costs that are compared; trees that differ by less cost the same."""
MOST_RECIPES = 4
"""Most recipes of a leaf: each serves problems that those before it cannot."""


def fit(lessons: Sequence[Lesson]) -> dict[str, Any]:
    """Return the trees that serve lessons best, one for each kind of kernels, as JSON values."""
    found = {}
    for kernels in Kernels:
        same = tuple(lesson for lesson in lessons if lesson.at.kernels is kernels)
        if same:
            found[str(kernels)] = _Trees(_recipes(same)).best(same).tree
    return found


def _recipes(lessons: Iterable[Lesson]) -> list[Recipe]:
    """Return every recipe that was timed, first those that most workloads were timed with."""
    timed = Counter(
        recipe for each in lessons for recipe in {Recipe.of(trial.schedule, each.at.variant) for trial in each.trials}
    )
    return sorted(timed, key=lambda recipe: (-timed[recipe], repr(recipe)))


@dataclass(frozen=True)
class _Grown:
    """A tree, and what it costs: the logarithms of its lessons' times over their best, and ``GAIN`` for each split."""

    tree: dict[str, Any]
    cost: float


@dataclass(frozen=True)
class _Split:
    """Lessons up to a threshold of a feature, and the others."""

    feature: str
    low: float
    """The largest value of the former."""
    high: float
    """The least of the latter."""
    yes: tuple[Lesson, ...]
    no: tuple[Lesson, ...]

    @property
    def at_most(self) -> float:
        """A threshold halfway by ratio, in two digits, as nothing is known in between."""
        middle = float(f"{math.sqrt(self.low * self.high):.2g}")
        return middle if self.low <= middle < self.high else self.low

    @property
    def gap(self) -> float:
        """How far apart both sides are, as a ratio: what lies between is the likelier to be served well."""
        return math.inf if not self.low else self.high / self.low


class _Trees:
    """The cheapest tree of any lessons, of which each set is worked out once."""

    def __init__(self, recipes: Sequence[Recipe]) -> None:
        self._recipes = recipes
        self._known: dict[tuple[int, ...], _Grown] = {}

    def best(self, lessons: tuple[Lesson, ...]) -> _Grown:
        """Return a leaf, unless it serves a lesson badly and a split is cheaper.

        Of equal ones it is that of the earlier feature, which says more of other problems, then of the widest gap.
        """
        key = tuple(map(id, lessons))
        if key not in self._known:
            self._known[key] = self._grow(lessons)
        return self._known[key]

    def _grow(self, lessons: tuple[Lesson, ...]) -> _Grown:
        chosen, costs = _choose(lessons, self._recipes)
        leaf = _Grown(
            {"recipes": [recipe.written for recipe in chosen], "of": [lesson.at.name for lesson in lessons]}, sum(costs)
        )
        splits, names = list(_splits(lessons)), list(lessons[0].at.having)
        if max(costs) <= math.log1p(CLOSE) or not splits:
            return leaf
        priced = [(self.best(split.yes).cost + self.best(split.no).cost + GAIN, split) for split in splits]
        cost, best = min(priced, key=lambda one: (round(one[0], DIGITS), names.index(one[1].feature), -one[1].gap))
        if round(cost, DIGITS) >= round(leaf.cost, DIGITS):
            return leaf
        yes, no = self.best(best.yes).tree, self.best(best.no).tree
        return _Grown({"feature": best.feature, "at most": best.at_most, "yes": yes, "no": no}, cost)


def _splits(lessons: Sequence[Lesson]) -> Iterator[_Split]:
    for feature in lessons[0].at.having:
        values = sorted({lesson.at.having[feature] for lesson in lessons})
        for low, high in pairwise(values):
            sides: dict[bool, list[Lesson]] = {True: [], False: []}
            for lesson in lessons:
                sides[lesson.at.having[feature] <= low].append(lesson)
            yield _Split(feature, low, high, tuple(sides[True]), tuple(sides[False]))


def _choose(lessons: Sequence[Lesson], recipes: Sequence[Recipe]) -> tuple[list[Recipe], list[float]]:
    """Return the recipes that serve lessons best, and what each lesson then costs.

    The first is, of those within ``CLOSE`` of the least cost, the one that most workloads were timed with, the next
    likewise for those that the first cannot serve: what one workload alone was timed with is seldom another's best.
    """
    chosen: list[Recipe] = []
    costs = [UNKNOWN] * len(lessons)
    left = list(range(len(lessons)))
    while left and len(chosen) < MOST_RECIPES:
        totals = [sum(UNKNOWN if (c := lessons[i].cost(r)) is None else c for i in left) for r in recipes]
        within = min(totals) + math.log1p(CLOSE) * len(left)
        recipe = next(r for r, total in zip(recipes, totals, strict=True) if total <= within)
        served = {i: cost for i in left if (cost := lessons[i].cost(recipe)) is not None}
        if not served:
            break
        chosen.append(recipe)
        for i, cost in served.items():
            costs[i] = cost
        left = [i for i in left if i not in served]
    return chosen, costs


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
    alike = at.device.arch, at.kernels
    same = [o for o in lessons if (o.at.device.arch, o.at.kernels) == alike and o.at.variant != at.variant]
    tree = fit(same).get(str(at.kernels))
    return next(serving(tree, at.variant, at.device, at.bucket), None) if tree else None
