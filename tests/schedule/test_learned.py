"""The learned rule: recipes keep their meaning, the rule is valid everywhere, and the fallback is the family's."""

from __future__ import annotations

import pytest
from support import make_variant

from m2gen.bucket import BUCKETS, Bucket
from m2gen.device import PORTABLE, TARGETS
from m2gen.schedule import default, defaults, learned, parse, problems
from m2gen.schedule.learned import Kernels, kernels_of, learned_schedule, rules
from m2gen.schedule.recipes import Recipe
from m2gen.variant import Variant

H200 = TARGETS["sm_90"]
SIZES = [(rows, cols) for rows in (1, 16, 64, 200, 256) for cols in (8, 16, 24, 64, 128)]


def variant(rows: int, cols: int, dtype: str = "bf16") -> Variant:
    """Return a variant whose tanh may be approximate, with four heads that share a query."""
    return make_variant(rows, cols, (1, 1, 4, 4, 4), dtype, tanh="approx")


@pytest.mark.parametrize(
    "slug",
    [
        "mma_f64x2u8a_b64x2c8atx_i8_s7_ptx",
        "mma_f16x4u4a_b16x4c2psx_i16_ptx",
        "portable_f32x1u4p_b16x1c2a_i32_ptx",
        "wgmma_ap_i8_ptx",
    ],
)
def test_a_recipe_is_its_schedule_again(slug: str) -> None:
    """A schedule's recipe gives it back for the same variant, also after being written and read."""
    schedule, served = parse(slug), variant(64, 64 if "sx_" in slug or "wgmma" in slug else 16)
    recipe = Recipe.of(schedule, served)
    assert Recipe.read(recipe.written) == recipe
    assert recipe.at(served, H200) == schedule


def test_a_recipe_follows_the_dims() -> None:
    """Programs of a whole state stay so, at the same number of elements a warp; fewer rows make smaller programs."""
    recipe = Recipe.of(parse("mma_f64x2u8a_b64x2c8atx_i8_ptx"), variant(64, 16))
    assert recipe.at(variant(256, 16), H200) == parse("mma_f64x2u8a_b256x8c8atx_i8_ptx")
    assert recipe.at(variant(16, 16), H200) == parse("mma_f16x1u8a_b16x1c8atx_i8_ptx")


@pytest.mark.parametrize("scratch", ["", "s", "t"])
def test_a_recipe_has_the_clamp_of_the_gpu(scratch: str) -> None:
    """Whatever clamped in its schedule, one instruction does where the GPU has it; no recipe says which."""
    slug, served = "mma_f32x1u8a_b64x2c8a{}_i8_ptx", variant(64, 16)
    one, two = (parse(slug.format(scratch + x)) for x in ("x", ""))
    recipe = Recipe.of(one, served)
    assert recipe == Recipe.of(two, served)
    assert "backward.xorsign" not in recipe.written
    for arch, expected in (("sm_80", two), ("sm_86", one), ("sm_89", one), ("sm_90", one), ("sm_120", one)):
        assert recipe.at(served, TARGETS[arch]) == expected
    elsewhere = recipe.at(served, TARGETS["gfx942"])
    assert not elsewhere.backward.xorsign


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_every_default_is_valid(rows: int, cols: int, dtype: str) -> None:
    """The rule's choice, or the family's, is a schedule that can serve, in every bucket on every target."""
    served = variant(rows, cols, dtype)
    for device in (*TARGETS.values(), PORTABLE):
        for bucket in BUCKETS:
            assert not problems(served, default(served, device, bucket), device)


def test_the_rule_has_a_tree_for_all_kernels() -> None:
    """Each of the four kinds was timed on the arch of the trials."""
    assert set(rules()) == {"sm_90"}
    assert set(rules()["sm_90"]["trees"]) == set(Kernels)
    kinds = {kernels_of(variant(64, cols, dtype), H200) for cols in (16, 64, 128) for dtype in ("bf16", "fp32")}
    assert kinds == set(Kernels)


def test_what_is_not_valid_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first recipe that a variant can have serves it, and the family's default where it can have none."""
    served = variant(64, 16)
    wide, narrow = (parse(slug) for slug in ("wgmma_ap_i8_ptx", "mma_f16x1u8a_b64x4c8atx_i8_ptx"))
    recipes = [Recipe.of(each, served).written for each in (wide, narrow)]
    for having, expected in ((recipes, narrow), (recipes[:1], default(served, H200)), ([], default(served, H200))):
        rule = {"sm_90": {"trees": {str(kernels_of(served, H200)): {"recipes": having}}}}
        monkeypatch.setattr(learned, "rules", lambda rule=rule: rule)
        assert default(served, H200, Bucket.ONE) == expected


def test_other_arches_have_the_defaults_of_families() -> None:
    """An arch without trials, and calls of unknown size, are served as without a rule."""
    served = variant(64, 16)
    assert learned_schedule(served, TARGETS["sm_80"], Bucket.ONE) is None
    assert default(served, TARGETS["sm_80"], Bucket.ONE) == default(served, TARGETS["sm_80"])
    first, *others = defaults(served, H200, Bucket.MORE)
    assert first == learned_schedule(served, H200, Bucket.MORE)
    assert {*others, first} >= set(defaults(served, H200))
