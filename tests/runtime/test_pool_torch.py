"""Operators on pools inside PyTorch: registration, compilers, tracers, transforms, and checks of slots on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import Spy, module_of, operators_of, packed, same_bits
from pooled import ints, operands_of, poisoned, tokens
from support import GATED_HEADS, SCHEDULES, build_package, import_package, make_variant
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from m2gen.problem import Inputs, Problem, make_inputs

PLAIN, GATED = make_variant(4, 4), make_variant(4, 4, GATED_HEADS, gate="softplus")
BATCH, STEPS, SLOTS, EVERY = 3, 2, 7, 6


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return an imported package."""
    built = build_package("registered", [PLAIN, GATED], SCHEDULES["two_level_partial"])
    return import_package(tmp_path_factory.mktemp("registered") / "registered", built, "m2gen_test_registered")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Forget what other tests compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(device: torch.device | str, batch: int = BATCH, variant=PLAIN) -> Inputs:
    """Return the operands of a few requests, with states."""
    return make_inputs(variant, Problem(batch, STEPS, initial_state=True), seed=batch).to(torch.device(device))


def filled(inputs: Inputs) -> Tensor:
    """Return a pool whose first slots have the requests' states."""
    pool = poisoned(SLOTS, inputs)
    pool[: inputs.initial_state.shape[0]] = inputs.initial_state
    return pool


def by_step(package: ModuleType, inputs: Inputs, pool: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    return package.m2rnn_step(
        **tokens(operands_of(inputs), 0), state=pool, indices=table[:, 0], out_indices=table[:, 1]
    )


def by_steps(package: ModuleType, inputs: Inputs, pool: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    accepted = torch.ones_like(table[:, 0])
    return package.m2rnn_steps(**operands_of(inputs), pool=pool, indices=table, accepted=accepted)


def by_prompt(package: ModuleType, inputs: Inputs, pool: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    has = table[:, 1] > 1
    return package.m2rnn(**operands_of(inputs), pool=pool, indices=table[:, 0], has_initial_state=has)


def by_packed_prompt(package: ModuleType, inputs: Inputs, pool: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    offsets = torch.arange(table.shape[0] + 1, device=pool.device) * STEPS
    return package.m2rnn(**operands_of(packed(inputs)), cu_seqlens=offsets, pool=pool, indices=table[:, 0])


def by_kept_prompt(package: ModuleType, inputs: Inputs, pool: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    return package.m2rnn(
        **operands_of(inputs), pool=pool, indices=table[:, 0], out_indices=table[:, 0] - SLOTS, states_every=EVERY,
        states_indices=table[:, 1:],
    )  # fmt: skip


CALLS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "step": by_step, "steps": by_steps, "prompt": by_prompt, "packed_prompt": by_packed_prompt,
    "kept_prompt": by_kept_prompt,
}  # fmt: skip


def table_of(batch: int, like: Tensor) -> Tensor:
    """Return slots to start from, one of them of padding, and others to write to."""
    starts = torch.arange(batch)
    table = torch.stack((starts, SLOTS - 1 - starts), 1)
    table[1] = -1
    return table.to(like.device)


@pytest.mark.parametrize(
    ("name", "variant"), [*zip(CALLS, (GATED, PLAIN, PLAIN, GATED, PLAIN), strict=True)], ids=CALLS
)
def test_compiled_calls_are_eager_ones(package, device, name, variant) -> None:
    """One graph, for any number of requests, writes the caller's pool as the eager call does."""

    def call(inputs: Inputs, pool: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return CALLS[name](package, inputs, pool, table)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3):
            inputs = draw(device, batch, variant)
            pools, table = [filled(inputs) for _ in range(2)], table_of(batch, inputs.q)
            y, returned = compiled(inputs, pools[0], table)
            expected, _ = call(inputs, pools[1], table)
            assert same_bits(y, expected)
            assert same_bits(*pools)
            assert same_bits(returned, pools[1])


@pytest.mark.parametrize("name", CALLS)
def test_operators_and_launchers_do_the_same(package, device, name, monkeypatch) -> None:
    """A call that a mode must see goes through torch's dispatcher, with the same result and the same errors."""
    inputs = draw(device)
    pools, table = [filled(inputs) for _ in range(2)], table_of(BATCH, inputs.q)
    expected, _ = CALLS[name](package, inputs, pools[0], table)
    with FlopCounterMode(display=False) as counter:
        y, _ = CALLS[name](package, inputs, pools[1], table)
    assert same_bits(y, expected)
    assert same_bits(*pools)
    heads, rows, cols = pools[0].shape[1:]
    count = BATCH * (1 if name == "step" else STEPS)
    assert counter.get_total_flops() == 2 * count * heads * rows * cols * (cols + 2)


def test_opcheck(package, device) -> None:
    """All of opcheck, of each operator: schema, mutation, fake tensors, dispatch with dynamic shapes."""
    inputs, library = draw(device, variant=GATED), operators_of(package)
    names = ("q", "k", "v", "weight", "forget", "A_log", "dt_bias")
    operands = [getattr(inputs, name) for name in names]
    pool, indices = filled(inputs).nan_to_num(), ints(0, -1, 2, like=inputs.q)  # it takes NaN for a difference
    table, accepted = ints([0, 1], [-1, -1], [2, 3], like=inputs.q), ints(1, 1, 2, like=inputs.q)
    seed, dims = torch.tensor(3, device=device), [4, 4, *GATED.heads.counts]
    torch.library.opcheck(library.POOL_STEPS, (*operands, indices, table, None, None, pool))
    torch.library.opcheck(library.POOL_STEPS, (*operands, table, table, accepted, seed, pool.half()))
    torch.library.opcheck(library.POOL_GATHER, (pool, indices, indices > 0, dims))
    scanned = (*operands, inputs.initial_state, None, None, table, None, EVERY, False, pool)
    torch.library.opcheck(library.POOL_SCAN, scanned)
    torch.library.opcheck(library.POOL_SCATTER, (inputs.initial_state, indices, seed, dims, pool.bfloat16()))


@pytest.mark.parametrize("name", CALLS)
def test_calls_without_memory(package, name) -> None:
    """Meta and fake tensors have the shapes and dtypes of results."""
    with FakeTensorMode():
        fake = draw("cpu")
        fakes = CALLS[name](package, fake, filled(fake), torch.zeros(BATCH, 2, dtype=torch.int64))
    inputs = draw("meta")
    results = CALLS[name](package, inputs, filled(inputs), torch.zeros(BATCH, 2, dtype=torch.int64, device="meta"))
    lead = {"step": (BATCH,), "packed_prompt": (BATCH * STEPS,)}.get(name, (BATCH, STEPS))
    for y, pool in (fakes, results):
        assert tuple(y.shape) == (*lead, 2, 4)
        assert tuple(pool.shape) == (SLOTS, 2, 4, 4)


def test_mapped_over_pools(package, device) -> None:
    """``vmap`` over pools is a call for each; a pool that all share cannot be written for each."""
    inputs, table = draw(device), table_of(BATCH, draw(device).q)
    pools, alone = (torch.stack([filled(inputs), filled(inputs) / 2]) for _ in range(2))
    y, _ = torch.vmap(lambda pool: by_steps(package, inputs, pool, table))(pools)
    expected = [by_steps(package, inputs, pool, table)[0] for pool in alone]
    assert same_bits(y, torch.stack(expected))
    assert same_bits(pools, alone)
    with pytest.raises(RuntimeError, match="pool must be mapped"):
        torch.vmap(
            lambda q: package.m2rnn_steps(**{**operands_of(inputs), "q": q}, pool=alone[0], indices=table[:, 0])
        )(torch.stack((inputs.q, inputs.q)))


def test_operators_refuse_gradients(package, device) -> None:
    """An operand that wants one is an error of the operators, too, and so is a tangent."""
    inputs, library = draw(device), operators_of(package)
    indices, pool = ints(0, 1, 2, like=inputs.q), filled(inputs)
    operands = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.weight, inputs.forget)]
    with pytest.raises(RuntimeError, match="must not require a gradient"):
        library.POOL_STEPS(*operands, None, None, indices, indices, None, None, pool)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(
            lambda q: package.m2rnn_steps(**{**operands_of(inputs), "q": q}, pool=pool, indices=indices)[0],
            (inputs.q,), (inputs.q,),
        )  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_update_is_seen_by_autograd(package, device, name) -> None:
    """A pool saved for a backward and then written makes that backward fail, not lie; under inference nothing does."""
    inputs = draw(device)
    pool, table = filled(inputs), table_of(BATCH, inputs.q)
    factor = torch.ones((), device=device, requires_grad=True)
    product = (pool * factor).sum()
    CALLS[name](package, inputs, pool, table)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        kept = filled(inputs)
        CALLS[name](package, inputs, kept, table)
        assert bool(kept[:BATCH:2].isfinite().all())


def test_without_indices_nothing_is_new(package, device, monkeypatch) -> None:
    """A step on a contiguous state is the step's kernel, and a prompt on none the forward's alone."""
    inputs = draw(device)
    spy = Spy(package, monkeypatch)
    package.m2rnn_step(**tokens(operands_of(inputs), 0), state=inputs.initial_state.clone())
    package.m2rnn(**operands_of(inputs))
    assert spy.launched == ["step", "forward"]
    by_step(package, inputs, filled(inputs), table_of(BATCH, inputs.q))
    assert spy.launched == ["step", "forward"]


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "read": ({"indices": [0, 7, 1]}, IndexError, "indices must be below the pool's 7 slots, got 7"),
    "write": ({"out_indices": [[0, 1], [2, 9], [3, -1]]}, IndexError, "out_indices must be below .* got 9"),
    "twice": ({"out_indices": [[0, 1], [2, 1], [3, 4]]}, ValueError, "out_indices .* got 1 for two"),
    "defaults": ({"indices": [0, 2, 2]}, ValueError, "out_indices .* got 2 for two"),
    "race": ({"out_indices": [2, 5, 6]}, ValueError, "out_indices must not name slot 2, .* starts from"),
    "race_of_the_first_slot": ({"out_indices": [5, 0, 6]}, ValueError, "out_indices must not name slot 0, .* starts"),
    "race_of_accepted": (
        {"indices": [[0, 1], [2, 3], [4, 5]], "accepted": [2, 1, 1], "out_indices": [6, 1, 4]},
        ValueError,
        "out_indices must not name slot 1, .* starts from",
    ),
    "accepted": ({"indices": [[0, 1], [2, 3], [4, 5]], "accepted": [1, 3, 1]}, IndexError, "accepted .* got 3"),
}
RIGHT: dict[str, dict[str, Any]] = {
    "padding": {"indices": [0, -1, -1], "out_indices": [3, -1, -1]},
    "own_slots_again": {"indices": [0, 1, 2], "out_indices": [[0, 0], [3, 1], [2, 4]]},
    "accepted": {"indices": [[0, 1], [2, 3], [4, 5]], "accepted": [1, 2, 0]},
}


def given(inputs: Inputs, slots: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of several tokens."""
    tables = {name: ints(*x, like=inputs.q) for name, x in {"indices": [0, 1, 2], **slots}.items()}
    return {**operands_of(inputs), "pool": filled(inputs), **tables}


@pytest.mark.parametrize("wrong", WRONG)
def test_slots_are_checked_on_request(package, device, monkeypatch, wrong) -> None:
    """With M2GEN_DEBUG=1, slots that a pool does not have, and requests that would race, raise before anything runs."""
    slots, error, message = WRONG[wrong]
    call = given(draw(device), slots)
    package.m2rnn_steps(**call)
    monkeypatch.setattr(module_of(package, "pool_checks"), "DEBUG", True)
    before = call["pool"].clone()
    with pytest.raises(error, match=f"^m2rnn_steps: {message}"):
        package.m2rnn_steps(**call)
    assert same_bits(call["pool"], before)


@pytest.mark.parametrize("right", RIGHT)
def test_right_slots_pass_the_checks(package, device, monkeypatch, right) -> None:
    """Padding, a request's own slots, and what a table has beside those that count, are nobody's fault."""
    monkeypatch.setattr(module_of(package, "pool_checks"), "DEBUG", True)
    package.m2rnn_steps(**given(draw(device), RIGHT[right]))


def test_prompts_may_swap_slots_under_the_checks(package, device, monkeypatch) -> None:
    """All states of prompts are read before any is written, so only slots that two write are wrong."""
    monkeypatch.setattr(module_of(package, "pool_checks"), "DEBUG", True)
    inputs = draw(device)
    call = {**operands_of(inputs), "pool": filled(inputs), "indices": ints(0, 1, 2, like=inputs.q)}
    package.m2rnn(**call, out_indices=ints(1, 0, 2, like=inputs.q))
    with pytest.raises(ValueError, match=r"^m2rnn: out_indices .* got 1 for two"):
        package.m2rnn(**call, out_indices=ints(1, 1, 2, like=inputs.q))
