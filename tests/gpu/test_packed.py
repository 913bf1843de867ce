"""Packed batches on the kernels of the published models, whose iterations make k v^T of many steps at once."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from calls import PER_SEQUENCE, STEPWISE, assert_same, changed, differentiate, of_sequence, spans
from support import make_variant

from m2gen.device import detect
from m2gen.problem import Inputs, Problem, make_inputs
from m2gen.schedule import Family, default

PUBLISHED = make_variant(64, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx")
LENGTHS = (7, 1, 0, 8, 37, 0, 16, 3)
"""Sequences that end within, before and after an iteration of eight steps, and within intervals of sixteen."""
CASES = [
    pytest.param(make_variant(16, 16, (1, 1, 2, 2, 2), "bf16"), (1, 0, 2, 1), 2, id="small"),
    *(
        pytest.param(PUBLISHED, LENGTHS, index, marks=pytest.mark.gpu, id=f"sequence_{index}")
        for index, length in enumerate(LENGTHS)
        if length
    ),
]


def with_one_of(inputs: Inputs, index: int, value: float) -> Inputs:
    """Return the batch with a value in place of every operand, state and incoming gradient of one sequence."""
    start, end = spans(inputs)[index]
    every = {**dict.fromkeys(STEPWISE, slice(start, end)), **dict.fromkeys(PER_SEQUENCE, slice(index, index + 1))}
    other = changed(inputs, every, torch.clone)
    for name, part in every.items():
        getattr(other, name)[part] = value
    return other


@pytest.mark.gpu
def test_the_kernels_are_explicit() -> None:
    """On NVIDIA GPUs the default is of mma and has iterations of eight steps, which this file is about."""
    device = detect()
    assert device is not None
    if not device.is_nvidia:
        pytest.skip("mma is NVIDIA's")
    schedule = default(PUBLISHED, device)
    assert (schedule.family, schedule.forward.rows, schedule.forward.unroll) == (Family.MMA, 64, 8)


@pytest.mark.parametrize("value", [nan, inf, 3.0])
@pytest.mark.parametrize(("variant", "lengths", "index"), CASES)
def test_no_sequence_sees_its_neighbour(built, device, variant, lengths, index, value) -> None:
    """Whatever one sequence holds, no bit of another changes, and none is other than finite in the default mode."""
    operator = built(variant).m2rnn
    inputs = make_inputs(variant, Problem(0, 0, lengths=lengths, initial_state=True), seed=index).to(device)
    other = with_one_of(inputs, index, value)
    before, after = (differentiate(operator, x, deterministic=True) for x in (inputs, other))
    usual = differentiate(operator, other)
    assert not torch.equal(before["y"], after["y"])
    for i in (i for i in range(len(lengths)) if i != index):
        assert_same(of_sequence(after, inputs, i), of_sequence(before, inputs, i))
        assert all(x.isfinite().all() for x in of_sequence(usual, inputs, i).values())
