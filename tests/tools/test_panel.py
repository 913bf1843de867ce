"""The panel of recipes: each is a schedule that some variant of the shipped specs takes, on the GPU that it is for."""

from __future__ import annotations

from collections import defaultdict

from support import ROOT

from m2gen.device import target
from m2gen.schedule import problems
from m2gen.schedule.knobs import Family
from m2gen.schedule.recipes import Recipe
from m2gen.spec import load_spec
from m2gen.variant import expand
from tools.panel import panel

HOPPER = target("sm_90")


def test_every_recipe_serves_some_variant() -> None:
    """A recipe that is valid nowhere would have a place on the panel and never be timed."""
    specs = [load_spec(path) for path in sorted((ROOT / "specs").glob("*.yaml"))]
    variants = {built.variant for spec in specs for built in expand(spec)}
    found: dict[Recipe, set[str]] = defaultdict(set)
    for variant in variants:
        for recipe in panel(variant):
            found[recipe] |= set(problems(variant, recipe.at(variant, HOPPER), HOPPER)) or {""}
    assert {str(recipe.written): said for recipe, said in found.items() if "" not in said} == {}
    assert {recipe.family for recipe in found} == set(Family)
