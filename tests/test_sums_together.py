"""Sums over a warp's threads that several steps share, walked lane by lane: who ends up with what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support import make_variant

from m2gen.device import TARGETS
from m2gen.layouts import Together, backward_together, forward_together
from m2gen.schedule import Layouts, Schedule, default

LANES = np.arange(32)
ROW, COL = LANES // 4, LANES % 4
"""Of a tile of 8 rows, of which a lane has two columns, summed to one of four."""
VARIANT = make_variant(64, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx")
SAME = {"y": COL, "dv": COL, "dq": ROW, "dk": ROW, "df": LANES * 0}
"""Lanes whose values are of one sum have the same number."""
STEP = {"y": (ROW, 8), "dv": (ROW, 8), "dq": (COL, 4), "dk": (COL, 4), "df": (ROW, 8)}
"""What tells a lane's step, and of how many."""

CASES = [("y", 8), *((name, steps) for name in STEP for steps in (2, 4))]


def exchanged(x: np.ndarray, lanes: int) -> np.ndarray:
    return x[LANES ^ lanes]


def added(one: np.ndarray, other: np.ndarray, upper: np.ndarray, lanes: int) -> np.ndarray:
    return np.where(upper, other, one) + exchanged(np.where(upper, one, other), lanes)


def walk(name: str, together: Together, parts: np.ndarray) -> np.ndarray:
    """Run the statements of a sum on the parts (steps, lanes) that lanes have; return what each lane ends up with."""
    known = {f"{name}_{step}": part for step, part in enumerate(parts)}
    known |= {"sum_row": ROW, "all_row": ROW, "sum_lane": COL, "all_lane": COL, "COL_SUMS_LOADED": None}
    known |= {"added": added, "exchanged": exchanged, "columns_as_loaded": lambda x, layout: x}
    for line in together.lines:
        exec(line, known)
    return known[f"{name}_0"]


def schedule(steps: int) -> Schedule:
    chosen = replace(default(VARIANT, TARGETS["sm_90"]), layouts=Layouts.EXPLICIT)
    forward, backward = replace(chosen.forward, unroll=steps), replace(chosen.backward, chunk=min(steps, 4))
    return replace(chosen, forward=forward, backward=backward)


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_every_lane_has_the_sum_of_its_step(name: str, steps: int) -> None:
    """Over exactly the lanes that share a sum, whole numbers so that no order of them differs."""
    chosen = schedule(steps)
    every = backward_together(VARIANT, chosen) | {"y": forward_together(VARIANT, chosen)}
    together = every[name]
    assert together is not None
    parts = np.random.default_rng(0).integers(1, 10**6, (steps, 32))
    found = walk(name, together, parts)
    index, count = STEP[name]
    for lane in LANES:
        step = index[lane] // (count // steps)
        assert found[lane] == parts[step][SAME[name] == SAME[name][lane]].sum()


def test_a_gate_that_is_computed_sums_alone() -> None:
    """Its slopes differ from step to step; and several warps, or a chunk of one step, share nothing."""
    gated = replace(VARIANT, gate=make_variant(gate="softplus").gate)
    assert set(backward_together(gated, schedule(2))) == {"dq", "dk", "dv"}
    assert set(backward_together(VARIANT, schedule(2))) == {"dq", "dk", "dv", "df"}
    chosen = schedule(2)
    assert backward_together(VARIANT, replace(chosen, backward=replace(chosen.backward, chunk=1))) == {}
    assert backward_together(VARIANT, replace(chosen, backward=replace(chosen.backward, warps=2))) == {}
    assert forward_together(VARIANT, replace(chosen, forward=replace(chosen.forward, warps=2))) is None
    assert forward_together(VARIANT, replace(chosen, layouts=Layouts.AUTO)) is None
