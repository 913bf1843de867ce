"""Narrow pools rounded at random: to a neighbour, on average to the number itself, and the same for the same seed."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from calls import operators_of, same_bits
from pooled import ints, operands_of, poisoned, requests, tokens
from support import SCHEDULES, build_package, import_package, make_variant
from torch import Tensor

from m2gen.problem import Inputs, Problem, make_inputs

VARIANT, TALL = make_variant(4, 4), make_variant(256, 4)
DIMS = [256, 4, *TALL.heads.counts]
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
DRAWS = 2 * 256
"""Elements of a column of all heads, which have random numbers of their own."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return an imported package."""
    built = build_package("rounded", [VARIANT, TALL], SCHEDULES["two_level_partial"])
    return import_package(tmp_path_factory.mktemp("rounded") / "rounded", built, "m2gen_test_rounded")


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the numbers of a dtype on both sides of each x, which are x where the dtype has it."""
    near = x.to(dtype)
    up, down = (torch.nextafter(near, torch.full_like(near, end)) for end in (torch.inf, -torch.inf))
    return torch.where(near.float() > x, down, near).float(), torch.where(near.float() < x, up, near).float()


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("scale", [1.0, 2.0**-17, 100.0])
def test_rounding_is_to_a_neighbour_and_right_on_average(package, device, kind, scale) -> None:
    """States at the usual scale, where fp16 has no exponent left, and beyond 1, each rounded by many seeds."""
    dtype = NARROW[kind]
    generator = torch.Generator().manual_seed(3)
    state = torch.randn(5, 1, 1, 4, generator=generator) * scale
    state[0, 0, 0, :3] = torch.tensor([0.0, 1.0, -0.5])
    state = state.to(device).expand(5, 2, 256, 4)
    pool = torch.full(state.shape, torch.nan, dtype=dtype, device=device)
    every = torch.arange(5, device=device)
    operators_of(package).POOL_SCATTER(state.contiguous(), every, every, DIMS, pool)
    below, above = neighbours(state, dtype)
    drawn = pool.float()
    assert bool(((drawn == below) | (drawn == above)).all())
    gap = (above - below).double()
    share = torch.where(gap > 0, (state.double() - below) / gap, 0.0)
    deviation = (share * (1 - share) / DRAWS).sqrt() * gap
    assert bool(((drawn.double().mean((1, 2), keepdim=True) - state).abs() <= 5 * deviation + gap / DRAWS).all())


@pytest.mark.parametrize("kind", NARROW)
def test_what_is_not_finite_stays_so(package, device, kind) -> None:
    """Infinities and NaN are not rounded into something else."""
    state = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], device=device).expand(1, 2, 256, 4).contiguous()
    pool = torch.zeros(1, 2, 256, 4, dtype=NARROW[kind], device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    operators_of(package).POOL_SCATTER(state, zero, zero, DIMS, pool)
    assert same_bits(pool.float(), state)


@pytest.fixture
def inputs(device) -> Inputs:
    """Return three requests of three tokens."""
    return make_inputs(VARIANT, Problem(3, 3, initial_state=True), seed=4).to(device)


def filled(inputs: Inputs, slots: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a pool that has the requests' states in these slots."""
    pool = poisoned(6, inputs, dtype)
    pool[list(slots)] = inputs.initial_state.to(dtype)
    return pool


def test_seeds_decide_the_bits(package, inputs) -> None:
    """A seed gives the same bits as an int, a tensor, or one for each request; another gives others."""
    token, indices = tokens(operands_of(inputs), 0), ints(0, 1, 2, like=inputs.q)
    one = torch.tensor(9, device=inputs.q.device)
    pools = []
    for seed in (9, one, one[None], one.expand(3), one + 1):
        pools.append(filled(inputs, (0, 1, 2)))
        package.m2rnn_step(**token, state=pools[-1], indices=indices, rounding_seed=seed)
    assert all(same_bits(pool, pools[0]) for pool in pools[1:4])
    assert not same_bits(pools[4], pools[0])


def test_a_request_has_its_bits_wherever_it_is(package, inputs) -> None:
    """The bits depend on the request's seed: not on its slot, its place in the batch, or how many tokens a call has."""
    operands, seeds = operands_of(inputs), torch.tensor([5, 50, 500], device=inputs.q.device)
    together, alone = (filled(inputs, (0, 1, 2)) for _ in range(2))
    y, _ = package.m2rnn_steps(**operands, pool=together, indices=ints(0, 1, 2, like=seeds), rounding_seed=seeds)
    order = [2, 0, 1]
    alone[[4, 5, 3]] = alone[[0, 1, 2]]
    moved = requests(operands, order)
    for t in range(3):
        y_t, _ = package.m2rnn_step(
            **tokens(moved, t), state=alone, indices=ints(3, 4, 5, like=seeds), rounding_seed=seeds[order] + t
        )
        assert same_bits(y_t, y[order, t])
    assert same_bits(alone[[4, 5, 3]], together[:3])


def test_a_prompt_is_rounded_at_random(package, inputs) -> None:
    """The final state of a prompt goes to a neighbour, by its seed."""
    operands, indices = operands_of(inputs), ints(0, 1, 2, like=inputs.q)
    pools = [filled(inputs, (0, 1, 2)) for _ in range(3)]
    _, state = package.m2rnn(**operands, initial_state=pools[0][:3].float())
    for pool, seed in zip(pools, (1, 1, 2), strict=True):
        package.m2rnn(**operands, pool=pool, indices=indices, rounding_seed=seed)
    below, above = neighbours(state, torch.bfloat16)
    assert same_bits(pools[0], pools[1])
    assert not same_bits(pools[0], pools[2])
    assert bool(((pools[0][:3] == below) | (pools[0][:3] == above)).all())
