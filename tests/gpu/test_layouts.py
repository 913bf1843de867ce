"""Kernels of ``mma`` and ``wgmma`` on a GPU: no interpreter runs them, and a stand-in knows nothing of layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import make_variant

from m2gen.device import Device, detect
from m2gen.measure.checks import STEPS, seeded_cases
from m2gen.schedule import Mma, Schedule, Wgmma, check, default, parse, problems
from m2gen.schedule.wgmma import HOPPER
from m2gen.spec import Objective
from m2gen.tune.candidate import load
from m2gen.tune.check import Candidate, check_candidate
from m2gen.variant import Variant

pytestmark = pytest.mark.gpu

VARIANTS = {
    "published": make_variant(64, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx"),
    "rows": make_variant(256, 16, (1, 1, 2, 2, 2), "fp16", tanh="approx"),
    "masked_softplus": make_variant(24, 9, (2, 1, 4, 2, 4), "fp16", "total", gate="softplus"),
    "square": make_variant(64, 64, (2, 2, 2, 2, 2), "bf16", tanh="approx"),
    "wide": make_variant(32, 128, (1, 1, 2, 2, 2), "bf16"),
}


def within_budget(variant: Variant, schedule: Schedule, device: Device) -> None:
    """Fail unless every output and gradient is, on the check's problems and on those that it holds back."""
    candidate = Candidate(load(variant, check(variant, schedule, device)), variant, schedule, Objective.TRAIN)
    asked = (*seeded_cases(variant, STEPS), *seeded_cases(variant, STEPS, held_out=True))
    verdict = check_candidate(candidate, asked, torch.device("cuda"))
    assert verdict.failure is None, verdict.failure
    assert {"y", "state", "dq", "dk", "dv", "dweight", "dforget"} <= {error.tensor for error in verdict.errors}


@pytest.mark.parametrize("warps", [None, 2])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_output_and_gradient(variant: Variant, warps: int | None) -> None:
    """Against float64, on the check's problems and those that it holds back; with warps that share a program, too."""
    device = detect()
    assert device is not None
    schedule = Mma.default(variant, device)
    if warps is not None:
        parts = {side: replace(getattr(schedule, side), warps=warps) for side in ("forward", "backward")}
        schedule = replace(schedule, **parts)
    within_budget(variant, schedule, device)


GROUPED = {
    "square": make_variant(64, 64, (2, 2, 2, 2, 2), "bf16", tanh="approx"),
    "square_fp16": make_variant(64, 64, (1, 1, 4, 4, 2), "fp16", tanh="approx"),
    "masked_softplus": make_variant(40, 40, (1, 2, 4, 2, 4), "bf16", "total", gate="softplus"),
    "two_parts": make_variant(96, 64, (2, 1, 2, 2, 2), "bf16", tanh="approx"),
    "four_parts_fp16": make_variant(256, 33, (1, 1, 2, 2, 1), "fp16", "total", gate="softplus", tanh="approx"),
}


@pytest.mark.parametrize("variant", GROUPED.values(), ids=GROUPED.keys())
@pytest.mark.parametrize("interval", [8, 5, 2])
def test_warpgroups(variant: Variant, interval: int) -> None:
    """Every output and gradient against float64, with one and several programs for a head's rows."""
    device = detect()
    assert device is not None
    if device.arch != HOPPER:
        pytest.skip("only Hopper has wgmma")
    schedule = replace(Wgmma.default(variant, device), interval=interval)
    within_budget(variant, schedule, device)


APART = {
    "published": (VARIANTS["published"], ("f64x2u8a", "f64x2u4p", "f64x4u2a", "f32x2u8a")),
    "two_parts": (make_variant(128, 16, (1, 1, 2, 2, 2), "bf16", tanh="approx"), ("f64x2u8a", "f128x4u4a", "f64x2u8p")),
    "masked_softplus": (VARIANTS["masked_softplus"], ("f32x2u8a", "f32x2u4p")),
    "square": (VARIANTS["square"], ("f32x2u2a", "f64x4u4a")),
}


@pytest.mark.parametrize(("name", "forward"), [(name, f) for name, (_, every) in APART.items() for f in every])
def test_warps_with_rows_of_their_own(name: str, forward: str) -> None:
    """y from shared memory: one and several programs for a head's rows, as many outputs as threads, more and fewer."""
    variant, device = APART[name][0], detect()
    assert device is not None
    usual = Mma.default(variant, device)
    schedule = parse(f"mma_{forward}_{usual.backward.slug}_i{usual.interval}_{usual.tanh}")
    within_budget(variant, schedule, device)


SLOTS = {
    "published": (VARIANTS["published"], ("64x2", "64x4")),
    "one_warp": (make_variant(32, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx"), ("32x1", "32x2")),
    "masked_softplus": (make_variant(100, 9, (2, 1, 4, 2, 4), "bf16", "total", gate="softplus"), ("128x4", "128x8")),
    "many_rows": (make_variant(256, 16, (1, 1, 2, 2, 2), "bf16", tanh="approx"), ("256x8",)),
}


@pytest.mark.parametrize(("name", "tile"), [(name, tile) for name, (_, every) in SLOTS.items() for tile in every])
def test_forwards_with_slots(name: str, tile: str) -> None:
    """y by products in which each step has a slot: padded rows and columns, both clips, warps of 16 and of 32 rows."""
    variant, device = SLOTS[name][0], detect()
    assert device is not None
    schedule = parse(f"mma_f{tile}u8at_b{tile}c8at_i8_{Mma.default(variant, device).tanh}")
    within_budget(variant, schedule, device)


ACROSS = {
    "two_warps": make_variant(64, 32, (1, 1, 4, 4, 4), "bf16", tanh="approx"),
    "four_warps": make_variant(64, 64, (8, 8, 8, 8, 8), "bf16", tanh="approx"),
    "masked_softplus": make_variant(100, 40, (2, 1, 4, 2, 4), "bf16", "total", gate="softplus"),
    "eight_warps": make_variant(64, 128, (1, 1, 2, 2, 2), "bf16", tanh="approx"),
}


@pytest.mark.parametrize("forward", ["u4a", "u8at", "u8pt255"])
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("variant", ACROSS.values(), ids=ACROSS.keys())
def test_slots_of_warps_with_columns_of_their_own(variant: Variant, segments: int, forward: str) -> None:
    """What warps hand each other in every step, and what they sum of dq and dk, in one and in several segments."""
    device, warps = detect(), variant.padded_cols // 16
    assert device is not None
    tanh = Mma.default(variant, device).tanh
    cut = f"_s{segments}" if segments > 1 else ""
    schedule = parse(f"mma_f16x{warps}{forward}_b16x{warps}c8at_i8{cut}_{tanh}").on(device)
    if reasons := problems(variant, schedule, device):
        pytest.skip(f"shared memory of {device.arch} is too small: {reasons}")
    within_budget(variant, schedule, device)


def test_the_widest_state() -> None:
    """128 columns, whose kernels are portable, with gradients of initial states over 145 steps near f = 1."""
    variant = make_variant(128, 128, (8, 8, 8, 8, 8), "bf16", tanh="approx")
    device = detect()
    assert device is not None
    within_budget(variant, default(variant, device), device)
