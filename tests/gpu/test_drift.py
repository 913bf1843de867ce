"""16384 steps that hardly forget: a float32 state keeps what a bf16 one never takes in."""

from __future__ import annotations

import pytest
import torch
from calls import arguments, distance
from support import make_variant

from m2gen.problem import Draw, Gates, Problem, make_inputs
from m2gen.runtime import reference
from m2gen.runtime.reference import EXACT, Arithmetic
from m2gen.verify import FACTOR


@pytest.mark.parametrize("steps", [24, pytest.param(16384, marks=pytest.mark.gpu)])
def test_drift(built, device, record_property, steps) -> None:
    """At f = 1 - 1e-4, y and the state of bf16 operands stay within their budget; a bf16-state loop is far off.

    The budget is what eager PyTorch errs by with a float32 state, times a factor, plus a rounding (design, section 6).
    """
    variant = make_variant(heads=(1, 1, 2, 2, 2), dtype="bf16")
    inputs = make_inputs(variant, Problem(1, steps), 0, Draw(gates=Gates.SLOW)).to(device)
    operands = arguments(inputs)
    with torch.no_grad():
        exact = reference.m2rnn(**{name: x.double() for name, x in operands.items()}, arithmetic=EXACT)
        own = reference.m2rnn(**operands, arithmetic=Arithmetic(torch.float32, torch.bfloat16))
        loop = reference.m2rnn(**operands, arithmetic=Arithmetic(torch.bfloat16, torch.bfloat16))
        given = built(variant).m2rnn(**operands)
    for name, index in (("y", 0), ("state", 1)):
        error, eager, narrow = (distance(x[index], exact[index]) for x in (given, own, loop))
        budget = FACTOR * eager + torch.finfo(given[index].dtype).eps / 2
        record_property(f"{name}_at_{steps}", f"error {error:.2e}, budget {budget:.2e}, bf16-state loop {narrow:.2e}")
        assert error <= budget
        assert narrow > max(0.1, 10 * budget)
