"""Sums over a warp's threads that several steps share, walked lane by lane: who ends up with what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support import make_variant

from m2gen.device import TARGETS
from m2gen.kernels.reductions import Together, backward_together, forward_together
from m2gen.schedule import Layouts, Schedule
from m2gen.schedule.heuristic import default
from m2gen.spec import Dtype

LANES = np.arange(32)
ROW, COL = LANES // 4, LANES % 4
"""Of a tile of 8 rows, of which a lane has two columns, summed to one of four."""
VARIANT = make_variant(64, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx")
HALF = replace(VARIANT, dtype=Dtype.FP16)
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
    known |= {"added": added, "exchanged": exchanged, "columns_as_loaded": lambda x, layout: x, "tl": np}
    for line in together.lines:
        exec(line, known)
    return known[f"{name}_0"]


def schedule(steps: int) -> Schedule:
    chosen = replace(default(VARIANT, TARGETS["sm_90"]), layouts=Layouts.EXPLICIT)
    forward, backward = replace(chosen.forward, unroll=steps), replace(chosen.backward, chunk=min(steps, 4))
    return replace(chosen, forward=forward, backward=backward)


def summed(name: str, parts: np.ndarray) -> np.ndarray:
    """Return what each lane's sum is, of parts (steps, lanes) that lanes have."""
    return np.stack([parts[:, SAME[name] == SAME[name][lane]].sum(1) for lane in LANES], 1)


def assert_own_step(name: str, found: np.ndarray, sums: np.ndarray) -> None:
    index, count = STEP[name]
    step = index // (count // len(sums))
    assert np.array_equal(found, sums[step, LANES])


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_every_lane_has_the_sum_of_its_step(name: str, steps: int) -> None:
    """Over exactly the lanes that share a sum, whole numbers so that no order of them differs."""
    chosen = schedule(steps)
    every = backward_together(HALF, chosen) | {"y": forward_together(HALF, chosen)}
    together = every[name]
    assert together is not None
    parts = np.random.default_rng(0).integers(1, 10**6, (steps, 32))
    assert_own_step(name, walk(name, together, parts), summed(name, parts))


@pytest.mark.parametrize(("name", "steps"), [(name, steps) for name in ("dq", "dk") for steps in (2, 4)])
def test_sums_of_tensor_cores_are_only_chosen_from(name: str, steps: int) -> None:
    """Every lane has every step's sum of bf16 operands, and goes on with that of its own."""
    sums = summed(name, np.random.default_rng(0).integers(1, 10**6, (steps, 32)))
    assert_own_step(name, walk(name, backward_together(VARIANT, schedule(steps))[name], sums), sums)


def test_a_gate_that_is_computed_sums_alone() -> None:
    """Its slopes differ from step to step; and several warps, or a chunk of one step, share nothing."""
    gated = replace(VARIANT, gate=make_variant(gate="softplus").gate)
    assert set(backward_together(gated, schedule(2))) == {"dq", "dk", "dv"}
    assert set(backward_together(VARIANT, schedule(2))) == {"dq", "dk", "dv", "df"}
    chosen = schedule(2)
    assert backward_together(VARIANT, replace(chosen, backward=replace(chosen.backward, chunk=1))) == {}
    assert backward_together(VARIANT, replace(chosen, backward=replace(chosen.backward, warps=2))) == {}
    assert forward_together(VARIANT, replace(chosen, forward=replace(chosen.forward, warps=2))) is None
    assert forward_together(VARIANT, chosen.laid_out(Layouts.AUTO)) is None
