"""Deterministic sums on problems of several waves, where programs finish in another order each time."""

from __future__ import annotations

import pytest
import torch
from calls import assert_same, differentiate
from support import make_variant

from m2gen.device import detect
from m2gen.problem import Problem, make_inputs

REPEATS = 25
LAYERS = {
    # heads of q, k, v, f and w of 132: every operand is shared in one of them; 64 rows make two programs a head
    "shared_q_k": (1, 1, 132, 132, 132),
    "shared_v_f_w": (132, 132, 4, 12, 1),
}


def disturb() -> None:
    """Keep part of the GPU busy, so that the programs of the next launch start in another order."""
    if torch.cuda.is_available():
        with torch.cuda.stream(torch.cuda.Stream()):
            x = torch.rand(1024, 1024, device="cuda")
            for _ in range(int(torch.randint(1, 20, ()))):
                x = x @ x


def repeat(package, inputs, repeats: int) -> None:
    """Fail unless every repeat has the bits of the first."""
    first = differentiate(package.m2rnn, inputs, deterministic=True)
    for index in range(1, repeats):
        if index % 2:
            disturb()
        assert_same(differentiate(package.m2rnn, inputs, deterministic=True), first)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_25_repeats_of_several_waves(built, device, name) -> None:
    """y, the state and every gradient have the same bits 25 times, with more programs than the GPU holds at once."""
    variant, problem = make_variant(64, 16, LAYERS[name], "bf16", tanh="approx"), Problem(64, 33, initial_state=True)
    found = detect()
    assert found is not None
    blocks_at_once = 32 * found.sm_count  # of any kernel, on any NVIDIA GPU so far
    assert problem.batch * variant.total_heads * 2 > 2 * blocks_at_once
    repeat(built(variant), make_inputs(variant, problem, seed=0).to(device), REPEATS)


STRICT = [
    pytest.param(make_variant(32, 16, (2, 2, 1, 1, 1), "bf16"), Problem(1, 3, initial_state=True), id="small"),
    *(
        pytest.param(
            make_variant(64, 16, heads, "bf16", tanh="approx"),
            Problem(4, 33, initial_state=True),
            marks=pytest.mark.gpu,
            id=name,
        )
        for name, heads in LAYERS.items()
    ),
]


@pytest.mark.parametrize(("variant", "problem"), STRICT)
def test_under_torchs_strict_mode(built, device, variant, problem) -> None:
    """If torch refuses nondeterministic operations, a call runs, and has the bits of deterministic=True."""
    operator, inputs = built(variant).m2rnn, make_inputs(variant, problem, seed=1).to(device)
    expected = differentiate(operator, inputs, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert_same(differentiate(operator, inputs), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_same_in_small(built, device) -> None:
    """The logic of the test above, where the interpreter can run it."""
    variant = make_variant(32, 16, (2, 2, 1, 1, 1), "bf16")
    repeat(built(variant), make_inputs(variant, Problem(1, 3, initial_state=True), seed=0).to(device), 2)
