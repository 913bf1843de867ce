"""Numerics that no shipped spec combines, since a spec has one clip, one tanh and one kind of float32 products."""

from __future__ import annotations

import pytest
from support import make_variant

from m2gen.device import PORTABLE, detect
from m2gen.schedule import default
from m2gen.verify import Feature, cases, only, run_case

GROUPED = (1, 2, 4, 4, 2)
FEATURES = (Feature.RECURRENCE, Feature.PACKED, Feature.STATES)
VARIANTS = {
    "total_ieee": make_variant(64, 16, GROUPED, "fp32", "total"),
    "total_ieee_several_warps": make_variant(64, 64, GROUPED, "fp32", "total"),
    "total_fp16_approx": make_variant(64, 16, GROUPED, "fp16", "total", "approx"),
    "carry_tf32": make_variant(64, 16, GROUPED, "fp32", "carry", "approx", products="tf32"),
}
CASES = [
    pytest.param(
        make_variant(24, 9, GROUPED, "fp32", "total"), {"ragged", "dy_large", "gates_slow", "saturated"}, id="masked"
    ),
    *(pytest.param(variant, None, marks=pytest.mark.gpu, id=name) for name, variant in VARIANTS.items()),
]
"""Variants, and the names of their cases; all of ``FEATURES`` if None."""


@pytest.mark.parametrize(("variant", "names"), CASES)
def test_every_case_is_within_its_budget(built, device, variant, names) -> None:
    """Results and gradients against float64: every length, gate, weight and incoming gradient, packed and in pieces."""
    found = detect()
    interval = default(variant, found or PORTABLE).interval
    every = only(FEATURES, cases(variant, interval, interpreted=found is None))
    chosen = [case for case in every if names is None or case.name in names]
    assert len(chosen) == len(names) if names else len(chosen) > 30
    reports = [run_case(built(variant), variant, case, 0, device) for case in chosen]
    assert [(r.case, r.failure, [x for x in r.results if not x.passed]) for r in reports if not r.passed] == []
