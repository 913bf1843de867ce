"""Kernels that no interpreter runs, judged like all others: every result and gradient within its budget.

What is run is the very text that a GPU gets, on ``gluon_on_cpu``: the order of loads, the rounds in which lanes sum,
the slots of products, and what lies where in shared memory. What layouts cost, and what compilers make of them, is for
tests/gpu.
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from gluon_on_cpu import Constant, Tensor, load_module
from support import make_variant

from m2gen.device import TARGETS
from m2gen.kernels.lowering import Lowering
from m2gen.kernels.reductions import Reductions, Sums
from m2gen.kernels.render import render_kernel
from m2gen.measure.checks import SeededCase, seeded_cases
from m2gen.problem import Gates, Problem
from m2gen.runtime.launch_plan import plan_of
from m2gen.runtime.launchers import in_segments
from m2gen.schedule import Mma, Portable, Schedule, Wgmma, check, parse
from m2gen.spec import Objective
from m2gen.tune.check import Candidate, call_of, check_candidate
from m2gen.variant import Variant
from m2gen.verify import Case, Loss, cases, judge, oracle
from m2gen.verify.subject import inputs_of

HEADS = (1, 1, 2, 2, 2)
BF16 = make_variant(24, 9, HEADS, "bf16", tanh="approx")
HALF = make_variant(24, 9, HEADS, "fp16", "total")
GATED = make_variant(24, 9, (2, 1, 4, 2, 4), "bf16", gate="softplus")
SQUARE = make_variant(40, 40, HEADS, "bf16", tanh="approx")
LARGE = make_variant(64, 16, HEADS, "bf16", tanh="approx")
STEPS = 9
"""Steps of the plain problems, whose last iteration, chunk and interval are no whole ones."""
MANY = 144
"""Steps of a problem whose sums over steps are long."""

CASES = {
    "steps_share_sums": (BF16, "mma_f32x1u8a_b32x1c2as_i8_ptx"),
    "four_steps_of_states": (BF16, "mma_f16x1u4a_b16x1c4a_i8_ptx"),
    "half_precision": (HALF, "mma_f16x1u2p_b16x1c2ps_i4_exp"),
    "four_steps_of_half_precision": (HALF, "mma_f32x1u4a_b32x1c4a_i4_exp"),
    "computed_gate": (GATED, "mma_f32x1u4a_b32x1c2as_i4_exp"),
    "computed_gate_in_half_precision": (replace(HALF, gate=GATED.gate), "mma_f32x1u2a_b32x1c4a_i8_exp"),
    "every_chunk_is_saved": (BF16, "mma_f32x1u2a_b32x1c2a_i2_ptx"),
    "one_step": (BF16, "mma_f32x1u1a_b32x1c1a_i4_ptx"),
    "odd": (HALF, "mma_f32x1u3a_b32x1c3a_i6_exp"),
    "warps_share_rows": (BF16, "mma_f16x2u4a_b16x2c2as_i8_ptx"),
    "warps_have_rows": (LARGE, "mma_f64x4u4a_b64x2c1a_i4_ptx"),
    "warps_have_rows_of_all_heads": (LARGE, "mma_f64x2u8p_b32x2c2ps_i8_ptx"),
    "both": (SQUARE, "mma_f32x4u4a_b32x4c2a_i8_ptx"),
    "slots": (LARGE, "mma_f32x1u4a_b64x2c8at_i8_ptx"),
    "slots_of_one_warp_in_rows_of_all_heads": (replace(LARGE, state_expansion=32), "mma_f32x1u4p_b32x1c8pt_i8_ptx"),
    "slots_of_four_warps_and_masks": (
        replace(LARGE, state_expansion=100, head_dim=9),
        "mma_f64x4u4a_b128x4c8at_i8_ptx",
    ),
    "slots_of_sixteen_rows": (replace(LARGE, state_expansion=32), "mma_f32x1u4a_b32x2c8at_i8_ptx"),
    "slots_of_one_tile": (replace(LARGE, state_expansion=9), "mma_f16x1u4a_b16x1c8pt_i8_exp"),
    "slots_clamp_all": (replace(LARGE, state_expansion=32, clip=HALF.clip), "mma_f32x1u4a_b32x1c8at_i8_exp"),
    "slots_compute_gates": (replace(GATED, state_expansion=32), "mma_f32x1u4a_b32x1c8at_i8_exp"),
    "slots_across": (SQUARE, "mma_f16x8u8a_b16x4c8at_i8_ptx"),
    "slots_across_of_two_warps": (replace(SQUARE, head_dim=24), "mma_f16x4u4p_b16x2c8pt_i8_ptx"),
    "slots_across_of_eight_warps": (replace(SQUARE, head_dim=100), "mma_f16x8u4a_b16x8c8at_i8_exp"),
    "slots_across_clamp_all": (replace(SQUARE, clip=HALF.clip), "mma_f16x8u8a_b16x4c8atx_i8_ptx"),
    "slots_across_compute_gates": (replace(SQUARE, gate=GATED.gate), "mma_f16x8u8a_b16x4c8at_i8_ptx"),
    "slots_across_forwards": (SQUARE, "mma_f16x4u8at_b16x4c8at_i8_ptx"),
    "slots_across_forwards_of_two_warps": (
        replace(SQUARE, state_expansion=40, head_dim=24),
        "mma_f16x2u8pt_b16x2c8pt_i8_ptx",
    ),
    "slots_across_forwards_of_eight_warps": (replace(SQUARE, head_dim=100), "mma_f16x8u8at_b16x8c8at_i8_exp"),
    "slots_across_forwards_compute_gates": (replace(SQUARE, gate=GATED.gate), "mma_f16x4u8at_b16x4c8at_i8_ptx"),
    "slots_forwards": (LARGE, "mma_f64x2u8at_b64x2c8at_i8_ptx"),
    "slots_forwards_of_four_warps_and_masks": (
        replace(LARGE, state_expansion=100, head_dim=9),
        "mma_f128x4u8pt_b128x4c8pt_i8_ptx",
    ),
    "slots_forwards_of_one_tile": (replace(LARGE, state_expansion=9), "mma_f16x1u8at_b16x1c8at_i8_exp"),
    "slots_forwards_compute_gates": (replace(GATED, state_expansion=32), "mma_f32x1u8at_b32x1c8at_i8_exp"),
    "one_instruction_clamps": (LARGE, "mma_f64x2u8a_b32x2c2asx_i8_ptx"),
    "one_instruction_clamps_slots": (LARGE, "mma_f64x2u8at_b64x2c8atx_i8_ptx"),
    "warpgroups": (SQUARE, "wgmma_aa_i4_ptx"),
    "warpgroups_in_half_precision": (replace(SQUARE, dtype=HALF.dtype), "wgmma_pp_i5_exp"),
    "warpgroups_clamp_all": (replace(SQUARE, clip=HALF.clip), "wgmma_aa_i2_ptx"),
    "warpgroups_compute_gates": (replace(SQUARE, gate=GATED.gate), "wgmma_aa_i4_exp"),
    "warpgroups_of_eight_steps": (SQUARE, "wgmma_aa_i8_ptx"),
    "warpgroups_of_two_tiles": (replace(SQUARE, state_expansion=100), "wgmma_pp_i4_ptx"),
}


def judged(variant: Variant, schedule: Schedule, module: ModuleType) -> None:
    """Fail unless every tensor is within its budget on the tuner's problems, and its bits repeat."""
    candidate = Candidate(module, variant, schedule, Objective.TRAIN)
    verdict = check_candidate(candidate, seeded_cases(variant, STEPS), torch.device("cpu"))
    assert verdict.failure is None, verdict.failure
    assert len(verdict.errors) >= 8


@pytest.mark.parametrize(("variant", "slug"), CASES.values(), ids=CASES.keys())
def test_results_are_within_budget(variant: Variant, slug: str) -> None:
    """Plain calls that end within an iteration, clipped and not, and ragged packed ones from initial states."""
    schedule = check(variant, parse(slug), TARGETS["sm_90"])
    judged(variant, schedule, load_module(render_kernel(Lowering(variant, schedule))))


@pytest.mark.parametrize("slug", ["wgmma_aa_i8_exp", "mma_f64x4u4a_b64x4c4as_i16_exp"])
def test_a_computed_gates_gradients_over_many_steps(slug: str) -> None:
    """Sums over all steps, of which errors of states that are saved in 16 bits would be most, since many share one."""
    variant = make_variant(40, 40, (1, 2, 4, 2, 4), "bf16", "total", gate="softplus")
    schedule = check(variant, parse(slug), TARGETS["sm_90"])
    module = load_module(render_kernel(Lowering(variant, schedule)))
    verdict = check_candidate(
        Candidate(module, variant, schedule, Objective.TRAIN), seeded_cases(variant, MANY), torch.device("cpu")
    )
    assert verdict.failure is None, verdict.failure
    assert {"dA_log", "ddt_bias"} <= {error.tensor for error in verdict.errors}


def test_computed_gates_near_one_in_half_precision() -> None:
    """1 - f of 1e-6 makes slopes and gradients that float16 hardly holds: no family serves that would lose them."""
    variant = make_variant(40, 40, HEADS, "fp16", gate="softplus")
    case = next(case for case in cases(variant, 8, interpreted=False) if case.name == "softplus_vanishing")
    inputs = inputs_of(variant, case, 0, torch.device("cpu"))
    known = oracle(variant, case, inputs, 0)
    for family in (Mma, Wgmma):
        if not family.unsupported(variant, TARGETS["sm_90"]):
            schedule = family.default(variant, TARGETS["sm_90"])
            module = load_module(render_kernel(Lowering(variant, schedule)))
            found = judge(call_of(module, Objective.TRAIN, case, inputs).results(), known)
            assert [result for result in found if not result.passed] == [], schedule.slug


VANISHING = {
    "rows_apart": (replace(LARGE, gate=GATED.gate, tanh=GATED.tanh), "mma_f64x2u8a_b64x2c8at_i8_exp", {"dq"}),
    "across": (replace(SQUARE, gate=GATED.gate), "mma_f16x4u4a_b16x4c8at_i8_ptx", set()),
}
"""Slots, and what may be over its budget: float16 loses states of 1e-6, which checkpoints of the former are."""


@pytest.mark.parametrize(("variant", "slug", "over"), VANISHING.values(), ids=VANISHING.keys())
def test_slots_of_computed_gates_near_one(variant: Variant, slug: str, over: set[str]) -> None:
    """Gaps of an exact tanh are kept as such: of 11 bits, the gate's gradients were over their budgets 180 times."""
    case = next(case for case in cases(variant, 8, interpreted=False) if case.name == "softplus_vanishing")
    inputs = inputs_of(variant, case, 0, torch.device("cpu"))
    module = load_module(render_kernel(Lowering(variant, check(variant, parse(slug), TARGETS["sm_90"]))))
    found = judge(call_of(module, Objective.TRAIN, case, inputs).results(), oracle(variant, case, inputs, 0))
    assert {result.tensor for result in found if not result.passed} <= over
    assert all(result.error < 1.1 * result.budget for result in found)
    assert {"dA_log", "ddt_bias", "dforget"} <= {result.tensor for result in found}


@pytest.mark.parametrize("slug", ["mma_f16x4u8a_b16x4c8at_i8_ptx", "mma_f16x4u8at_b16x4c8at_i8_ptx"])
def test_slots_across_columns_of_given_gates_near_one(slug: str) -> None:
    """States of a few steps from none are 1e-6, and checkpoints of float32 have them to the last bit."""
    module = load_module(render_kernel(Lowering(SQUARE, check(SQUARE, parse(slug), TARGETS["sm_90"]))))
    case = Case("near_one", Problem(1, 20), Loss.BOTH)
    inputs = inputs_of(SQUARE, case, 0, torch.device("cpu"))
    for forgotten in (1e-6, 2.0**-23):
        near = torch.full_like(inputs.forget, 1 - forgotten, dtype=torch.float32)
        slow = replace(inputs, forget=near)
        found = judge(call_of(module, Objective.TRAIN, case, slow).results(), oracle(SQUARE, case, slow, 0))
        assert [result for result in found if not result.passed] == []
        assert {"y", "dq", "dweight", "dforget"} <= {result.tensor for result in found}


SEGMENTED = (
    "mma_f32x1u4a_b32x1c2as_i4_s3_ptx",
    "mma_f32x2u2a_b16x2c1a_i2_s2_ptx",
    "mma_f32x1u4a_b32x1c8at_i8_s3_ptx",
    "mma_f32x2u8at_b32x2c8at_i8_s3_ptx",
)
SEGMENTED_ACROSS = ("mma_f16x2u8a_b16x2c8at_i8_s3_ptx", "mma_f16x2u8at_b16x2c8at_i8_s3_ptx")


@pytest.mark.parametrize("slug", [*SEGMENTED, *SEGMENTED_ACROSS])
def test_segments_go_on_from_one_another(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """States, their gradients, dW and the gate's sums pass from program to program, of packed batches, too."""
    variant = replace(GATED, head_dim=24, tanh=BF16.tanh) if slug in SEGMENTED_ACROSS else GATED
    schedule = check(variant, replace(parse(slug), tanh=parse(CASES["odd"][1]).tanh), TARGETS["sm_90"])
    module = load_module(render_kernel(Lowering(variant, schedule)))
    monkeypatch.setattr(module, "SHORTEST", Constant(schedule.interval))
    monkeypatch.setitem(module.LAUNCH, "shortest_segment", schedule.interval)
    judged(variant, schedule, module)
    lengths = (0, 4 * schedule.interval + 3, 2 * schedule.interval + 1)
    assert in_segments(plan_of(module), len(lengths), sum(lengths), torch.zeros(len(lengths) + 1))
    packed = Case("packed", Problem(0, 0, lengths=lengths, initial_state=True), Loss.BOTH, gates=Gates.SLOW)
    candidate = Candidate(module, variant, schedule, Objective.TRAIN)
    verdict = check_candidate(candidate, [SeededCase(packed, 3)], torch.device("cpu"))
    assert verdict.failure is None, verdict.failure


IN_HALF = [name for name, (variant, _) in CASES.items() if variant.dtype is HALF.dtype and not variant.computes_gate]


@pytest.mark.parametrize("name", IN_HALF)
def test_gradients_of_states_that_half_precision_does_not_hold(name: str) -> None:
    """Those of states are float32, and 2^17 times as large where q dy^T is; those of operands fit and are so, too."""
    variant, slug = CASES[name]
    module = load_module(render_kernel(Lowering(variant, parse(slug))))
    case = Case("large", Problem(1, STEPS), clip=None, wide=True)
    inputs = inputs_of(variant, case, 0, torch.device("cpu"))
    slow = torch.full_like(inputs.forget, 0.99)
    small = replace(inputs, k=inputs.k / 16, v=inputs.v / 16, forget=slow, dstate=torch.zeros_like(inputs.dstate))
    large = replace(small, q=small.q * 2.0**13, dy=small.dy * 2.0**4)
    results = [call_of(module, Objective.TRAIN, case, each).results() for each in (small, large)]
    for tensor in ("dk", "dv", "dweight", "dforget"):
        of_small, of_large = (found[tensor].float() for found in results)
        assert of_large.isfinite().all(), tensor
        assert (of_large / 2.0**17 - of_small).norm() < 2e-3 * of_small.norm(), tensor


def clamping(variant: Variant, slug: str) -> dict[bool, str]:
    """Return the kernels of a schedule whose carried gradient one instruction clamps (True), and two."""
    two = parse(slug)
    assert isinstance(two, Mma)
    one = replace(two, backward=replace(two.backward, xorsign=True))
    both = {True: one, False: two}
    return {x: render_kernel(Lowering(variant, check(variant, both[x], TARGETS["sm_90"]))) for x in both}


CLAMPED = ("steps_share_sums", "computed_gate", "both", "slots", "slots_clamp_all", "odd", "slots_forwards")


@pytest.mark.parametrize("name", CLAMPED)
def test_one_instruction_clamps_as_two_do(name: str) -> None:
    """Every result and gradient has the same bits, clipped and not, packed, and in either mode."""
    variant, slug = CASES[name]
    modules = {x: load_module(text) for x, text in clamping(variant, slug).items()}
    for asked in seeded_cases(variant, STEPS):
        inputs = inputs_of(variant, asked.case, asked.seed, torch.device("cpu"))
        one, two = (call_of(modules[x], Objective.TRAIN, asked.case, inputs).results() for x in (True, False))
        assert one.keys() == two.keys()
        assert {"y", "dq", "dk", "dv"} < one.keys()
        for tensor, x in one.items():
            assert torch.equal(x, two[tensor]), f"{tensor} of {asked.case.name}"


@pytest.mark.parametrize("slug", ["mma_f32x1u4a_b32x1c2as_i8_ptx", "mma_f32x1u4a_b64x2c8at_i8_ptx"])
def test_the_texts_of_both_clamps(slug: str) -> None:
    """They differ in the body of one function and in the schedule's name alone."""
    bodies, others = {}, {}
    for xorsign, text in clamping(LARGE, slug).items():
        (found,) = re.findall(r"@gluon\.jit\ndef clamp\(.*?\n\n\n", text, re.S)
        bodies[xorsign], others[xorsign] = found, text.replace(found, "").replace("x_i8", "_i8")
    assert others[True] == others[False]
    assert bodies[True].count("min.NaN.xorsign.abs.f32 $0, $1, $2;") == bodies[True].count("xorsign") == 1
    assert "propagate_nan" not in bodies[True]
    assert "inimum" not in bodies[True]
    assert bodies[False].count("propagate_nan") == 2
    assert "xorsign" not in bodies[False]


UNUSUAL = (np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 0.5, -0.5, 1.0, -1.0, 3e38, -3e38)


@pytest.mark.parametrize("bound", [1.0, 0.5, 0.0, float("inf")])
def test_both_clamp_what_is_no_usual_number(bound: float) -> None:
    """NaN stays NaN, an infinity becomes the bound, and a zero keeps its sign unless the bound is zero, too."""
    carried = np.array(UNUSUAL, np.float32)
    numbers = ~np.isnan(carried)
    expected = np.copysign(np.minimum(np.abs(carried), np.float32(bound)), carried)[numbers]
    for text in clamping(LARGE, "mma_f32x1u4a_b64x2c8at_i8_ptx").values():
        clamped = load_module(text).clamp(Tensor(carried), bound).array.astype(np.float32)
        assert np.isnan(clamped).tolist() == (~numbers).tolist()
        if bound:
            assert clamped[numbers].view(np.int32).tolist() == expected.view(np.int32).tolist()
        else:  # numpy does not say which of 0 and -0 is the smaller
            assert not clamped[numbers].any()


@pytest.mark.parametrize("interval", [4, 8])
@pytest.mark.parametrize(("name", "back"), [("k", 0), ("v", 15)])
def test_how_far_a_nan_reaches_back_among_warpgroups(interval: int, name: str, back: int) -> None:
    """One in v reaches y of steps whose operands are loaded with its own, as the documents say, and one in k none."""
    module = load_module(render_kernel(Lowering(SQUARE, parse(f"wgmma_aa_i{interval}_ptx"))))
    case, step = Case("nan", Problem(1, 24)), interval + 15  # the last that is loaded with the second interval
    inputs = inputs_of(SQUARE, case, 0, torch.device("cpu"))
    getattr(inputs, name)[:, step] = torch.nan
    spoiled = call_of(module, Objective.INFER, case, inputs).results()["y"].isnan().flatten(2).any(2)
    assert spoiled[0].tolist() == [t >= step - back for t in range(24)]


def test_the_cases_have_every_way_to_sum() -> None:
    """The cases sum y and gradients by shuffles, products and shared memory."""
    every = [Reductions(variant, parse(slug)) for variant, slug in CASES.values()]
    assert {sums.y for sums in every} == set(Sums)
    assert {(s.together, s.df_together, s.by_product) for s in every} == {
        (False, False, False),
        (True, True, True),
        (True, True, False),
        (True, False, True),
        (True, False, False),
    }


def test_what_shares_sums() -> None:
    """Not a gate that the kernel computes, whose slopes differ from step to step, several warps, or a single step."""
    variant = make_variant(64, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx")
    chosen = parse("mma_f32x1u8a_b32x1c2as_i16_ptx")
    assert not Reductions(variant, Mma.default(variant, TARGETS["sm_90"])).together  # slots sum otherwise

    def sums(variant: Variant, **knobs: int) -> Reductions:
        forward = replace(chosen.forward, **{"warps": knobs["warps"]} if "warps" in knobs else {})
        return Reductions(variant, replace(chosen, forward=forward, backward=replace(chosen.backward, **knobs)))

    assert sums(variant).df_together
    gated = sums(replace(variant, gate=GATED.gate))
    assert gated.together
    assert not gated.df_together
    assert not sums(variant, chunk=1).together
    assert not sums(variant, warps=2).together
    assert sums(variant).y is Sums.BUTTERFLY
    assert sums(variant, warps=2).y is Sums.MEMORY
    assert Reductions(variant, Portable.default(variant, TARGETS["sm_90"])).y is Sums.EACH
