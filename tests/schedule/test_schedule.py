"""The one validity predicate of schedules, and the defaults that must satisfy it."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SCHEDULES, as_mma, make_schedule, make_variant

from m2gen.device import PORTABLE, TARGETS, limits, target
from m2gen.errors import ScheduleError
from m2gen.kernels.reductions import Reductions, Sums
from m2gen.schedule import (
    FAMILIES,
    Family,
    Mma,
    Portable,
    Reduction,
    Schedule,
    Scratch,
    Tanh,
    Wgmma,
    check,
    default,
    defaults,
    parse,
    problems,
)
from m2gen.schedule.mma_tiles import MmaBackward, sums_bytes
from m2gen.schedule.recipes import Recipe
from m2gen.schedule.slots import slots_bytes
from m2gen.spec import Dtype, GateKind
from m2gen.variant import Variant

DEVICES = (*TARGETS.values(), PORTABLE)
WIDE = make_variant(64, 64)
SQUARE = make_variant(64, 64, (2, 2, 2, 2, 2), "bf16", tanh="approx")


def _with(direction: str, **facts: Any) -> Portable:
    """Return a valid schedule with some facts of one direction replaced."""
    base = make_schedule(interval=16)
    return replace(base, **{direction: replace(getattr(base, direction), **facts)})


INVALID: dict[str, tuple[Schedule, str]] = {
    "rows_below_a_tile": (_with("forward", rows=8), "forward.rows must be a power of two from 16 to 64, got 8"),
    "rows_no_power": (_with("backward", rows=48), "backward.rows must be a power of two from 16 to 64, got 48"),
    "rows_above_the_state": (
        _with("backward", rows=128),
        "backward.rows must be a power of two from 16 to 64, got 128",
    ),
    "three_warps": (_with("forward", warps=3), "forward.warps must be 1, 2, 4 or 8, got 3"),
    "no_warps": (_with("forward", warps=0), "forward.warps must be 1, 2, 4 or 8, got 0"),
    "many_warps": (_with("backward", warps=16), "backward.warps must be 1, 2, 4 or 8, got 16"),
    "no_unroll": (_with("forward", unroll=0), "forward.unroll must be from 1 to 16, got 0"),
    "long_chunk": (_with("backward", chunk=32), "backward.chunk must be from 1 to 16, got 32"),
    "chunk_off_interval": (_with("backward", chunk=3), "interval must be a multiple of backward.chunk = 3, got 16"),
    "unroll_off_interval": (_with("forward", unroll=5), "interval must be a multiple of forward.unroll = 5, got 16"),
    "no_interval": (make_schedule(interval=0), "interval must be a multiple of forward.unroll = 2, got 0"),
    "shared_for_nothing": (
        as_mma(make_schedule(interval=2), Scratch.SHARED),
        "backward.scratch must be l2 unless interval is above backward.chunk = 2, got shared",
    ),
    "shared_for_no_chunk": (
        as_mma(replace(make_schedule(), backward=replace(make_schedule().backward, chunk=0)), Scratch.SHARED),
        "backward.chunk must be from 1 to 16, got 0",
    ),
    "no_segments": (replace(make_schedule(), segments=0), "segments must be from 1 to 64, got 0"),
    "shared_for_too_much": (
        as_mma(make_schedule(interval=64, backward_rows=64), Scratch.SHARED),
        "backward.scratch must take at most 65536 bytes of shared memory, got 524288",
    ),
}


@pytest.mark.parametrize(("schedule", "reason"), INVALID.values(), ids=INVALID.keys())
def test_each_reason_is_given(schedule: Schedule, reason: str) -> None:
    """An invalid schedule is refused with what was expected and what was given."""
    assert reason in problems(WIDE, schedule, PORTABLE)
    with pytest.raises(ScheduleError, match="portable"):
        check(WIDE, schedule, PORTABLE)


@pytest.mark.parametrize(
    ("cols", "slug", "arch", "fits"),
    [
        (128, "mma_f128x8u8a_b16x8c2a_i8_exp", "sm_90", False),
        (128, "mma_f128x8u4a_b16x8c2a_i8_exp", "sm_90", True),
        (64, "mma_f128x8u8a_b16x8c2a_i8_exp", "sm_86", False),
        (64, "mma_f128x8u8a_b16x8c2a_i8_exp", "sm_90", True),
        (64, "mma_f64x4u16p_b16x4c2a_i16_exp", "sm_86", False),
        (64, "mma_f16x4u16p_b16x4c2a_i16_exp", "sm_86", True),
    ],
)
def test_what_warps_sum_of_y_fits_shared_memory(cols, slug, arch, fits) -> None:
    """A forward whose warps meet in more shared memory than a program may have is refused before it is compiled."""
    reasons = problems(make_variant(128, cols, dtype="bf16"), parse(slug), TARGETS[arch])
    assert [reason.partition(" must")[0] for reason in reasons] == ([] if fits else ["forward.unroll"])


@pytest.mark.parametrize("warps", [1, 2, 4, 8])
@pytest.mark.parametrize("unroll", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [16, 32, 128])
def test_the_memory_of_sums_is_that_of_kernels_that_have_it(rows, unroll, warps) -> None:
    """The predicate counts what the kernels allocate, and nothing where no warps meet."""
    variant, base = make_variant(128, 64, dtype="bf16"), as_mma(make_schedule())
    schedule = replace(base, forward=replace(base.forward, rows=rows, unroll=unroll, warps=warps), interval=unroll)
    sums = Reductions(variant, schedule)
    expected = unroll * sums.y_parts * 64 * 4 if sums.y is Sums.MEMORY else 0
    assert sums_bytes(variant, schedule.forward) == expected


def test_the_scratch_is_in_shared_memory_where_that_costs_no_programs() -> None:
    """Eight warps an SM: 16 KiB each of the published state fit the 227 of sm_90 and the 163 of sm_80, not 99."""
    published = make_variant(64, 16, (1, 1, 4, 4, 4), "fp16", tanh="approx")
    chosen = {arch: default(published, TARGETS[arch]) for arch in TARGETS}
    assert all(schedule.scratch_bytes(published) == 16384 for schedule in chosen.values())
    shared = {arch for arch, schedule in chosen.items() if schedule.backward.scratch is Scratch.SHARED}
    assert shared == {"sm_80", "sm_90", "sm_100"}
    assert Portable.default(published, TARGETS["sm_90"]).backward.scratch is Scratch.L2


def slotted(rows: int, warps: int) -> MmaBackward:
    """Return a backward whose steps have slots."""
    return MmaBackward(rows, warps, 8, Reduction.ATOMIC, Scratch.SLOTS)


def test_slots_serve_states_of_more_columns() -> None:
    """A warp for 16 columns of 16 rows, to 128 columns: what is not tuned keeps the schedule that was timed."""
    for cols, warps in ((17, 2), (32, 2), (64, 4), (128, 8)):
        variant = make_variant(64, cols, (1, 1, 4, 4, 4), "bf16", tanh="approx")
        schedule = parse(f"mma_f16x{warps}u4a_b16x{warps}c8at_i8_ptx")
        assert not problems(variant, schedule, TARGETS["sm_90"])
        assert Mma.default(variant, TARGETS["sm_90"]).backward.scratch is not Scratch.SLOTS
        forwards = parse(f"mma_f16x{warps}u8at255_b16x{warps}c8at_i8_ptx")
        assert not problems(variant, forwards, TARGETS["sm_90"])
        for each in (schedule, forwards):
            recipe = Recipe.of(each, variant)
            assert recipe.at(replace(variant, state_expansion=256), TARGETS["sm_90"]) == each.on(TARGETS["sm_90"])
        reasons = problems(variant, parse("mma_f16x1u4a_b64x1c8at_i8_ptx"), TARGETS["sm_90"])
        assert reasons[:2] == (
            "backward.rows must be 16 where backward.scratch is slots, got 64",
            f"backward.warps must be {warps} where backward.scratch is slots, got 1",
        )
    gated = make_variant(64, 40, (1, 1, 4, 4, 4), "bf16", gate="softplus")
    reasons = problems(gated, parse("mma_f16x4u4a_b16x4c8at_i8_exp"), TARGETS["sm_90"])
    assert reasons == ("backward.scratch must not be slots for a computed gate and an exact tanh above 16 columns",)
    widest = make_variant(64, 256, (1, 1, 4, 4, 4), "bf16", tanh="approx")
    reasons = problems(widest, parse("mma_f16x8u4a_b16x8c8at_i8_ptx"), TARGETS["sm_90"])
    assert "backward.scratch must be slots only for bf16 and at most 128 columns, got bf16 and 256" in reasons


def test_slots_serve_the_published_dims() -> None:
    """They serve bfloat16 states of 16 columns on NVIDIA, a warp for 32 rows, where shared memory has an interval."""
    archs = ("sm_80", "sm_86", "sm_90", "sm_100")
    for rows, warps in ((16, 1), (32, 1), (64, 2), (128, 4), (256, 8)):
        variant = make_variant(rows, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx")
        for arch in archs:
            schedule = default(variant, target(arch))
            serves = slots_bytes(variant, slotted(rows, warps)) <= target(arch).shared_bytes
            assert (schedule.backward.scratch is Scratch.SLOTS) is serves
            assert schedule.backward.warps == warps or not serves
    published = make_variant(64, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx")
    assert slots_bytes(published, slotted(64, 2)) == 57_344  # as compiled: four programs an SM of sm_90
    reasons = problems(variant, parse("mma_f16x1u4a_b256x2c4at_i16_ptx"), TARGETS["sm_90"])
    assert reasons == (
        "backward.warps must be 8 or 16 where backward.scratch is slots, got 2",
        "backward.chunk must be 8 where backward.scratch is slots, got 4",
        "interval must be 8 where backward.scratch is slots, got 16",
    )
    reasons = problems(variant, parse("mma_f128x4u4at_b256x8c8at_i8_ptx"), TARGETS["sm_90"])
    assert reasons == (
        "forward.unroll must be 8 where the forward has slots, got 4",
        "backward.rows must be 128 where the forward has slots, got 256",
        "backward.warps must be 4 where the forward has slots, got 8",
    )
    reasons = problems(published, parse("mma_f64x2u8at_b32x1c2as_i16_ptx"), TARGETS["sm_90"])
    assert "backward.scratch must be slots where the forward has slots, got shared" in reasons
    for slug in ("mma_f64x2u8a_b64x2c8at_i8_s7_ptx", "mma_f64x2u8at168_b64x2c8at_i8_ptx"):
        assert not problems(published, parse(slug), TARGETS["sm_90"])


def test_registers_are_said_of_forwards_with_slots() -> None:
    """As many as are searched; others have what their family gives them, and their slugs name none."""
    published = make_variant(64, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx")
    schedule = parse("mma_f64x2u8at255_b64x2c8at_i8_ptx")
    assert isinstance(schedule, Mma)
    assert (schedule.forward.registers, parse(schedule.slug)) == (255, schedule)
    reasons = problems(published, parse("mma_f64x2u8at64_b64x2c8at_i8_ptx"), TARGETS["sm_90"])
    assert reasons == ("forward.registers must be 0 or 168 or 255, got 64",)
    plain = replace(schedule, forward=replace(schedule.forward, slots=False))
    reasons = problems(published, plain, TARGETS["sm_90"])
    assert reasons == ("forward.registers must be 0 unless the forward has slots, got 255",)


def test_every_reason_at_once() -> None:
    """A schedule that is wrong twice is told so in one error."""
    schedule = replace(_with("forward", rows=8), interval=3)
    assert len(problems(WIDE, schedule, PORTABLE)) == 3


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "portable"])
def test_the_ptx_instruction_needs_nvidia(arch: str) -> None:
    """Hardware tanh is for NVIDIA targets, and for specs that allow an approximation."""
    approximate, device = make_variant(tanh="approx"), TARGETS.get(arch, PORTABLE)
    assert problems(approximate, make_schedule(tanh="ptx"), device) == (f"tanh must be exp on {arch}, got ptx",)
    assert problems(approximate, make_schedule(tanh="ptx"), TARGETS["sm_90"]) == ()
    assert problems(approximate, make_schedule(tanh="exp"), device) == ()


def test_exact_specs_refuse_the_approximate_instruction() -> None:
    """A spec that asks for exact tanh gets it on every target."""
    reasons = problems(make_variant(tanh="exact"), make_schedule(tanh="ptx"), TARGETS["sm_90"])
    assert reasons == ("tanh must be exp where the spec asks for exact, got ptx",)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_tests_own_schedules_are_valid(schedule: Schedule) -> None:
    """A search could choose the schedules of the kernel tests."""
    assert check(make_variant(), schedule, PORTABLE) is schedule


@st.composite
def any_variant(draw: st.DrawFn) -> Variant:
    """Draw a variant from everything that a spec may ask for."""
    total = draw(st.integers(1, 128))
    divisors = st.sampled_from([n for n in range(1, total + 1) if total % n == 0])
    heads = [draw(divisors) for _ in range(5)]
    heads[draw(st.integers(0, 4))] = total
    dims = (draw(st.integers(1, 256)), draw(st.integers(1, 128)))
    names = (draw(st.sampled_from(words)) for words in (("bf16", "fp16", "fp32"), ("carry", "total")))
    dtype, clip = names
    tanh = draw(st.sampled_from(["exact", "approx"]))
    return make_variant(*dims, tuple(heads), dtype, clip, tanh)  # type: ignore[arg-type]


@settings(max_examples=60)
@given(any_variant(), st.sampled_from(DEVICES))
def test_defaults_are_valid_for_every_variant_on_every_target(variant, device) -> None:
    """Whatever a spec asks for, some schedule serves it, and its programs cover the state exactly."""
    schedule = default(variant, device)
    assert problems(variant, schedule, device) == ()
    for part in (schedule.forward, schedule.backward):
        assert part.parts(variant) * part.rows == variant.padded_rows >= variant.state_expansion
    assert schedule.tanh is Tanh.EXP or device.is_nvidia


@settings(max_examples=60)
@given(any_variant(), any_variant())
def test_different_variants_have_different_keys(one, other) -> None:
    """Names in files, tables and records never stand for two variants."""
    assert (one.key == other.key) == (one == other)


def test_different_schedules_have_different_slugs() -> None:
    """Every knob shows in the name of a schedule."""
    knobs = ({"interval": 8}, {"unroll": 4}, {"chunk": 4}, {"forward_rows": 32}, {"backward_rows": 32}, {"warps": 2})
    every: list[Schedule] = [make_schedule(**knob) for knob in knobs]  # type: ignore[arg-type]
    every += [make_schedule(), make_schedule("partial"), make_schedule(tanh="ptx")]
    every += [replace(make_schedule(), segments=3), as_mma(make_schedule()), as_mma(make_schedule(), Scratch.SHARED)]
    usual = Wgmma.default(SQUARE, TARGETS["sm_90"])
    every += [usual, replace(usual, interval=4), replace(usual, tanh=Tanh.EXP)]
    assert len({schedule.slug for schedule in every}) == len(every)
    assert [parse(schedule.slug) for schedule in every] == every


@pytest.mark.parametrize(
    "slug",
    [
        "f16x1u2a_b16x1c2a_i4_exp",
        "f16x1u2a_b16x1c2a_i4_ptx_explicit",
        "portable_f16x1u2a_b16x1c2as_i4_exp",
        "portable_f16x1u2a_b16x1c2ax_i4_exp",
        "mma_f16x1u2a_b16x1c2axs_i4_exp",
        "wgmma_aa_i8_s3_ptx",
        "mma_aa_i12_ptx",
        "",
    ],
)
def test_what_names_no_schedule(slug: str) -> None:
    """No family, a knob that the family does not have, another family's knobs."""
    with pytest.raises(ScheduleError, match="a schedule must begin with its family, as mma_f32x1u4a_b32x1c2as_i16_ptx"):
        parse(slug)


@pytest.mark.parametrize("scratch", Scratch)
def test_a_slug_says_how_is_clamped(scratch: Scratch) -> None:
    """An x behind the letter of the scratch is one instruction; slugs from before there was one have two."""
    two = as_mma(make_schedule(), scratch)
    one = replace(two, backward=replace(two.backward, xorsign=True))
    letter = {Scratch.L2: "", Scratch.SHARED: "s", Scratch.SLOTS: "t"}[scratch]
    assert two.slug == f"mma_f16x1u2a_b16x1c2a{letter}_i4_exp"
    assert one.slug == f"mma_f16x1u2a_b16x1c2a{letter}x_i4_exp"
    assert (parse(one.slug), parse(two.slug)) == (one, two)
    cut = replace(one, segments=7)
    assert parse(cut.slug) == cut


HAVING = {"sm_80": False, "sm_86": True, "sm_89": True, "sm_90": True, "sm_100": True, "sm_120": True}


@pytest.mark.parametrize(("arch", "has"), {**HAVING, "gfx90a": False, "gfx942": False, "portable": False}.items())
def test_one_instruction_clamps_where_there_is_one(arch: str, has: bool) -> None:
    """On sm_86 and later, in every default of the family and every point that is searched; elsewhere it is refused."""
    device = TARGETS.get(arch, PORTABLE)
    assert device.has_xorsign is has
    published = make_variant(64, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx")
    for variant in (published, make_variant(64, 16, (1, 1, 4, 4, 4), "fp16"), SQUARE):
        usual = Mma.default(variant, device)
        assert usual.backward.xorsign is has
        assert Mma.axes(variant, device)["backward.xorsign"] == (has,)
        for xorsign in (False, True):
            found = problems(variant, replace(usual, backward=replace(usual.backward, xorsign=xorsign)), device)
            refused = f"backward.xorsign must be false on {arch}, got true"
            assert (refused in found) is (xorsign and not has)
            assert not device.is_nvidia or found in ((), (refused,))


@pytest.mark.parametrize(("arch", "has"), {"sm_75": False, "sm_87": True, "sm_103": True, "gfx1100": False}.items())
def test_gpus_that_no_table_has_clamp_by_their_number(arch: str, has: bool) -> None:
    """Records may be of such GPUs."""
    assert limits(arch).has_xorsign is has


def test_portable_kernels_clamp_by_two_instructions() -> None:
    """Their text is for every target; those of warpgroups, which one arch has, clamp by one, and neither has a knob."""
    assert not Portable.default(SQUARE, TARGETS["sm_90"]).backward.xorsign
    assert Wgmma.default(SQUARE, TARGETS["sm_90"]).backward.xorsign
    assert not {"backward.xorsign"} & {*Portable.AXES, *Wgmma.AXES}


def test_schedules_are_told_in_words() -> None:
    """The family and its tiles, of both kernels if they differ, and segments if there are several."""
    assert make_schedule(warps=2).describe() == "portable, 16 rows, 2 warps"
    assert Wgmma.default(SQUARE, TARGETS["sm_90"]).describe() == "wgmma, 64 rows, 4 warps"
    cut = replace(as_mma(make_schedule(forward_rows=64, backward_rows=32)), segments=7)
    assert cut.describe() == "mma, 64/32 rows, 1 warp, 7 segments"


def test_segments_are_whole_intervals() -> None:
    """A segment has at least 128 steps; warpgroups have no segments."""
    schedules = {interval: make_schedule(interval=interval) for interval in (1, 12, 16, 128)}
    assert {i: schedule.shortest_segment for i, schedule in schedules.items()} == {1: 128, 12: 132, 16: 128, 128: 128}
    assert "segments" not in Wgmma.AXES
    assert Wgmma.default(SQUARE, TARGETS["sm_90"]).segments == 1


@pytest.mark.parametrize("arch", ["gfx942", "portable"])
def test_mma_needs_nvidia(arch: str) -> None:
    """Its products are NVIDIA's, and no interpreter runs them."""
    device = TARGETS.get(arch, PORTABLE)
    assert f"family must be portable for bf16 on {arch}, got mma" in problems(SQUARE, as_mma(make_schedule()), device)
    assert [schedule.family for schedule in defaults(SQUARE, device)] == [Family.PORTABLE]


def test_mma_needs_operands_of_16_bits() -> None:
    """Registers of a product of float32 operands are laid out otherwise."""
    reasons = problems(WIDE, as_mma(make_schedule()), TARGETS["sm_90"])
    assert reasons == ("family must be portable for fp32 on sm_90, got mma",)


@pytest.mark.parametrize("schedule", ["mma_f16x4u4a_b16x1c2a_i16_ptx", "mma_f16x1u4a_b16x4c2a_i16_ptx"])
def test_every_warp_of_mma_has_a_tile(schedule: str) -> None:
    """Layouts of more warps than a tile has parts are none."""
    side = "forward" if "f16x4" in schedule else "backward"
    expected = f"{side}.warps must be at most 2, each with a 16 x 8 tile, got 4"
    published = make_variant(64, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx")
    assert problems(published, parse(schedule), TARGETS["sm_90"]) == (expected,)


@pytest.mark.parametrize(
    ("dims", "arch", "slug", "reason"),
    [
        ((64, 64), "sm_100", "wgmma_aa_i8_ptx", "family must be portable or mma on sm_100, got wgmma"),
        ((64, 32), "sm_90", "wgmma_aa_i8_ptx", "unless V is from 33 to 64 and K above 32, got wgmma"),
        ((32, 64), "sm_90", "wgmma_aa_i8_ptx", "unless V is from 33 to 64 and K above 32, got wgmma"),
        ((64, 64), "sm_90", "wgmma_aa_i16_ptx", "interval must be from 2 to 8, got 16"),
        ((64, 64), "sm_90", "wgmma_aa_i1_ptx", "interval must be from 2 to 8, got 1"),
    ],
)
def test_where_warpgroups_are_none(dims: tuple[int, int], arch: str, slug: str, reason: str) -> None:
    """The predicate says which architecture, dims and memory they need."""
    found = problems(make_variant(*dims, (2, 2, 2, 2, 2), "bf16", tanh="approx"), parse(slug), TARGETS[arch])
    assert any(reason in line for line in found), found


def test_which_family_is_preferred() -> None:
    """Warpgroups where there are many heads, then mma, up to the columns that it has registers for."""
    device = TARGETS["sm_90"]
    few, many = (make_variant(64, 64, (n, n, n, n, n), "bf16", tanh="approx") for n in (8, 16))
    assert [schedule.family for schedule in defaults(few, device)] == [Family.MMA, Family.WGMMA, Family.PORTABLE]
    assert [schedule.family for schedule in defaults(many, device)] == [Family.WGMMA, Family.MMA, Family.PORTABLE]
    assert default(many, TARGETS["sm_80"]) == Mma.default(many, TARGETS["sm_80"])
    assert default(make_variant(64, 128, dtype="bf16"), device).family is Family.PORTABLE
    half = replace(many, dtype=Dtype.FP16)
    assert default(half, device).family is Family.WGMMA
    gated = replace(half, gate=GateKind.SOFTPLUS)  # whose slopes and D may be below what float16 holds
    assert [schedule.family for schedule in defaults(gated, device)] == [Family.MMA, Family.PORTABLE]
    assert default(replace(gated, dtype=many.dtype), device).family is Family.WGMMA


@settings(max_examples=60)
@given(any_variant(), st.sampled_from(DEVICES))
def test_every_familys_default_is_valid_where_it_serves(variant, device) -> None:
    """Its values are among those that are searched, and no family serves what another refuses to name."""
    served = defaults(variant, device)
    assert {type(schedule) for schedule in served} == {f for f in FAMILIES if not f.unsupported(variant, device)}
    for schedule in served:
        assert problems(variant, schedule, device) == ()
        assert type(schedule).of({name: attrgetter(name)(schedule) for name in schedule.AXES}) == schedule
        assert all(attrgetter(name)(schedule) in values for name, values in schedule.axes(variant, device).items())
