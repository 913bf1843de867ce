"""Scans in several segments have the bits of one, on a GPU that holds few of their programs at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from calls import assert_same, differentiate
from support import build_package, import_package, make_variant

from m2gen.device import detect
from m2gen.problem import Problem, make_inputs
from m2gen.schedule import Family, default, parse

pytestmark = pytest.mark.gpu

SEGMENTS = 7
VARIANTS = {
    "shared_q_k": make_variant(64, 16, (1, 1, 84, 84, 84), "bf16", tanh="approx"),
    "softplus": make_variant(64, 16, (84, 1, 42, 84, 84), "bf16", tanh="approx", gate="softplus"),
    "wide": make_variant(64, 64, (8, 8, 8, 8, 8), "fp16", tanh="approx"),
}
PROBLEMS = {
    "padded": Problem(8, 1555, initial_state=True),
    "packed": Problem(0, 0, lengths=(0, 131, 1, 1700, 128, 900, 7, 1024, 2000), initial_state=True),
}
REPEATS = 5


@pytest.mark.parametrize("slots", [False, True], ids=["default", "forward_slots"])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_segments_have_the_bits_of_one(tmp_path, device, variant, problem, slots) -> None:
    """y, states and every gradient, of more programs than the GPU holds at once, again and again."""
    found = detect()
    assert found is not None
    schedule = default(variant, found)
    if slots:
        if not schedule.slots:
            pytest.skip("steps of this variant have no slots")
        back = schedule.backward
        schedule = parse(f"mma_f{back.rows}x{back.warps}u8at_{back.slug}_i8_{schedule.tanh}")
    assert schedule.family is Family.MMA  # tests/runtime/test_op_segments.py has the others
    whole, cut = (
        import_package(tmp_path / (name := f"{variant.key}_{made.slug}"), build_package(name, [variant], made)).m2rnn
        for made in (schedule, replace(schedule, segments=SEGMENTS))
    )
    inputs = make_inputs(variant, problem, seed=4).to(device)
    expected = differentiate(whole, inputs, deterministic=True)
    for _ in range(REPEATS):
        assert_same(differentiate(cut, inputs, deterministic=True), expected)
