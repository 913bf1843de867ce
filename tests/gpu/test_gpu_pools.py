"""Pools on a GPU: one captured graph over changing slots, nothing read on the host, and contiguous states' numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import distance, same_bits
from pooled import ints, operands_of, poisoned, tokens, untouched
from support import make_variant
from test_cuda_graphs import capture
from test_launches import no_waiting
from torch import Tensor
from torch._dynamo.utils import counters

from m2gen.problem import Inputs, Problem, make_inputs

pytestmark = pytest.mark.gpu

HEADS = (1, 1, 4, 2, 4)
VARIANTS = {
    "narrow": make_variant(64, 16, HEADS, "bf16"),
    "wide": make_variant(64, 64, HEADS, "bf16", gate="softplus"),
    "two_parts": make_variant(128, 64, HEADS, "fp16"),
    "fp32": make_variant(24, 17, HEADS),
}
BATCH, STEPS, SLOTS = 5, 4, 16
TOLERANCE = {"fp32": 1e-6, "bf16": 2.0**-8, "fp16": 2.0**-11}


def draw(device: torch.device, name: str = "narrow", seed: int = 0) -> Inputs:
    """Return a few requests with states."""
    return make_inputs(VARIANTS[name], Problem(BATCH, STEPS, initial_state=True), seed).to(device)


def filled(inputs: Inputs, slots: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a pool with the requests' states in these slots."""
    pool = poisoned(SLOTS, inputs, dtype)
    pool[slots.long()] = inputs.initial_state.to(dtype)
    return pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_steps_are_those_of_contiguous_states(built, device, name, dtype) -> None:
    """Tokens one by one and together have each other's bits, and a prompt's numbers; other slots stay as they were."""
    package, inputs = built(VARIANTS[name]), draw(device, name)
    slots = ints(3, 0, 15, 7, 8, like=inputs.q)
    together, single = (filled(inputs, slots, dtype) for _ in range(2))
    operands = operands_of(inputs)
    y, _ = package.m2rnn_steps(**operands, pool=together, indices=slots)
    for t in range(STEPS):
        expected, _ = package.m2rnn_step(**tokens(operands, t), state=single, indices=slots)
        assert same_bits(y[:, t], expected)
    assert same_bits(together, single)
    others = [slot for slot in range(SLOTS) if slot not in slots.tolist()]
    assert untouched(together[others])
    expected, state = package.m2rnn(**operands, initial_state=inputs.initial_state.to(dtype).float())
    bound = max(TOLERANCE[VARIANTS[name].dtype], 4 * torch.finfo(dtype).eps)
    assert distance(y, expected) <= bound
    assert distance(together[slots.long()], state) <= bound


@pytest.mark.parametrize("seeded", [False, True], ids=["nearest", "random"])
def test_a_captured_step_follows_its_slots(built, device, seeded) -> None:
    """One graph of a step serves slots, padding and seeds that change between replays, as eager steps do."""
    package, inputs = built(VARIANTS["narrow"]), draw(device)
    slots, out = ints(0, 1, 2, 3, 4, like=inputs.q), ints(0, 1, 2, 3, 4, like=inputs.q)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    rounding: dict[str, Any] = {"rounding_seed": seed} if seeded else {}
    pool = filled(inputs, slots, torch.bfloat16)
    token = {name: x.clone() for name, x in tokens(operands_of(inputs), 0).items()}
    graph, (y, _) = capture(lambda: package.m2rnn_step(**token, state=pool, indices=slots, out_indices=out, **rounding))
    pool.copy_(filled(inputs, slots, torch.bfloat16))
    expected = pool.clone()
    schedule = [([0, 1, 2, 3, 4], [9, 1, 2, 3, 4]), ([9, -1, 2, -1, 4], [9, -1, 0, -1, -1]), ([-1] * 5, [-1] * 5)]
    for step, (reads, writes) in enumerate(schedule):
        slots.copy_(ints(*reads, like=pool))
        out.copy_(ints(*writes, like=pool))
        seed.fill_(step)
        graph.replay()
        eager, _ = package.m2rnn_step(
            **token, state=expected, indices=slots.clone(), out_indices=out.clone(), **rounding
        )
        assert same_bits(y, eager)
        assert same_bits(pool, expected)


def test_captured_drafts_follow_what_was_accepted(built, device) -> None:
    """One graph of several tokens starts each replay from the accepted token's state."""
    package, inputs = built(VARIANTS["wide"]), draw(device, "wide")
    table = torch.arange(BATCH * 3, device=device, dtype=torch.int32).view(BATCH, 3)
    accepted = ints(*[1] * BATCH, like=inputs.q)
    operands = tokens(operands_of(inputs), slice(3))
    pool = filled(inputs, table[:, 0])
    graph, (y, _) = capture(lambda: package.m2rnn_steps(**operands, pool=pool, indices=table, accepted=accepted))
    pool.copy_(filled(inputs, table[:, 0]))
    expected = pool.clone()
    for counts in ([1, 1, 1, 1, 1], [3, 2, 1, 0, 1], [1, 3, 3, 2, 2]):
        accepted.copy_(ints(*counts, like=pool))
        graph.replay()
        eager, _ = package.m2rnn_steps(**operands, pool=expected, indices=table, accepted=accepted.clone())
        assert same_bits(y, eager)
        assert same_bits(pool, expected)


def test_warm_calls_never_wait(built, device) -> None:
    """Steps, drafts, and prompts whose offsets come with a copy on the host run ahead of the GPU."""
    package, inputs = built(VARIANTS["narrow"]), draw(device)
    slots, operands = ints(0, 1, 2, -1, 4, like=inputs.q), operands_of(inputs)
    pool, flat = filled(inputs, ints(0, 1, 2, 3, 4, like=slots), torch.bfloat16), dict(operands)
    flat |= {name: operands[name].flatten(0, 1) for name in ("q", "k", "v", "forget")}
    host = torch.arange(BATCH + 1) * STEPS
    offsets, has = host.to(device), slots > 0

    def run(cu_seqlens_cpu: Tensor) -> None:
        package.m2rnn_step(**tokens(operands, 0), state=pool, indices=slots, rounding_seed=3)
        package.m2rnn_steps(**operands, pool=pool, indices=slots)
        package.m2rnn(
            **flat, cu_seqlens=offsets, cu_seqlens_cpu=cu_seqlens_cpu, pool=pool, indices=slots, has_initial_state=has
        )

    run(host)
    with no_waiting():
        run(host.clone())


def test_reduced_overhead_captures_a_step(built, device) -> None:
    """``torch.compile(mode="reduce-overhead")`` makes a graph of a step on a pool whose address is static."""
    package, inputs = built(VARIANTS["narrow"]), draw(device)
    slots = ints(4, 3, 2, 1, 0, like=inputs.q)
    pool, expected = (filled(inputs, slots) for _ in range(2))
    torch._dynamo.mark_static_address(pool)

    def step(token: dict[str, Tensor], state: Tensor, indices: Tensor) -> Tensor:
        y, _ = package.m2rnn_step(**token, state=state, indices=indices)
        return y + 1

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        for t in range(STEPS):
            token = tokens(operands_of(inputs), t)
            torch.compiler.cudagraph_mark_step_begin()
            given = compiled(token, pool, slots).clone()
            assert same_bits(given, step(token, expected, slots))
            assert same_bits(pool, expected)
    assert counters["inductor"]["cudagraph_skips"] == 0
