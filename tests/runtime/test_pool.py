"""States in pools: tokens and prompts by slot are what contiguous states give, and other slots are left alone."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import assert_close, distance, packed, same_bits
from pooled import PER_TOKEN, ints, operands_of, poisoned, requests, tokens, untouched
from support import GATED_HEADS, SCHEDULES, build_package, import_package, make_variant
from torch import Tensor

from m2gen.device import TARGETS
from m2gen.problem import Inputs, Problem, make_inputs
from m2gen.schedule import FAMILIES

BATCH, STEPS, SLOTS = 3, 3, 7
VARIANTS = {
    "fp32": make_variant(4, 4),
    "bf16": make_variant(4, 4, dtype="bf16"),
    "masked_fp16": make_variant(9, 17, dtype="fp16"),
    "softplus": make_variant(4, 4, GATED_HEADS, gate="softplus"),
    "softplus_bf16": make_variant(4, 4, GATED_HEADS, "bf16", gate="softplus"),
    "grouped": make_variant(4, 4, (2, 4, 4, 1, 2)),
    "two_row_blocks": make_variant(65, 33, (1, 1, 1, 1, 1)),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps
NEAR = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""How far apart sums in two orders may be, rounded to a dtype."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return an imported package, whose programs have 16 rows each."""
    built = build_package("pooled", VARIANTS.values(), SCHEDULES["two_level_partial"])
    return import_package(tmp_path_factory.mktemp("pooled") / "pooled", built, "m2gen_test_pooled")


def draw(device: torch.device, name: str = "fp32", batch: int = BATCH, steps: int = STEPS) -> Inputs:
    """Return the operands of a few requests, with states."""
    return make_inputs(VARIANTS[name], Problem(batch, steps, initial_state=True), seed=batch + steps).to(device)


def filled(inputs: Inputs, slots: dict[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a poisoned pool that has request b's state in a slot, for each slot and b."""
    pool = poisoned(SLOTS, inputs, dtype)
    for slot, b in slots.items():
        pool[slot] = inputs.initial_state[b].to(dtype)
    return pool


def others(pool: Tensor, *touched: int) -> Tensor:
    """Return the slots that no call named."""
    return pool[[slot for slot in range(pool.shape[0]) if slot not in touched]]


@pytest.fixture
def inputs(device) -> Inputs:
    """Return three requests of three tokens."""
    return draw(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_by_slot_is_that_of_a_contiguous_state(package, device, name, dtype) -> None:
    """A request has the bits that it has alone; a skipped one gives zeros; nobody touches a slot without a name."""
    inputs = draw(device, name)
    pool = filled(inputs, {5: 0, 2: 2}, dtype)
    token = tokens(operands_of(inputs), 0)
    y, returned = package.m2rnn_step(**token, state=pool, indices=ints(5, -1, 2, like=pool))
    state = inputs.initial_state.to(dtype).float()
    expected, state = package.m2rnn_step(**token, state=state)
    assert returned is pool
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    one = VARIANTS[name].padded_rows == 16
    if one:  # sums over rows of several programs are in another order
        assert same_bits(y[::2], expected[::2])
    if one or device.type == "cuda":  # a CPU rounds a row of a product by how many others there are
        assert same_bits(pool[[5, 2]], state[::2].to(dtype))
    assert distance(y[::2], expected[::2]) <= NEAR[y.dtype]
    assert distance(pool[[5, 2]], state[::2].to(dtype)) <= NEAR[dtype]
    assert bool((y[1] == 0).all())
    assert untouched(others(pool, 5, 2))


def test_steps_are_those_of_the_float64_reference(package, device) -> None:
    """A prompt and steps after it, by slot, are the whole sequence in float64."""
    inputs = draw(device, steps=5)
    operands = operands_of(inputs)
    wide = {name: x.double() for name, x in operands.items()}
    expected, state = package.m2rnn(**wide, initial_state=inputs.initial_state.double(), backend="reference")
    pool, indices = filled(inputs, {1: 0, 0: 1, 4: 2}), ints(1, 0, 4, like=inputs.q)
    outputs = [package.m2rnn(**tokens(operands, slice(2)), pool=pool, indices=indices)[0]]
    outputs.append(package.m2rnn_step(**tokens(operands, 2), state=pool, indices=indices)[0][:, None])
    outputs.append(package.m2rnn_steps(**tokens(operands, slice(3, 5)), pool=pool, indices=indices)[0])
    given = {"y": torch.cat(outputs, 1), "state": pool[indices.long()]}
    assert_close(given, {"y": expected, "state": state}, 1e-6)


def page_padded(pool: Tensor) -> Tensor:
    """Return the pool in pages that hold something else after each state."""
    pages = pool.new_full((pool.shape[0], pool[0].numel() + 24), 7.0)
    view = pages[:, : pool[0].numel()].unflatten(1, pool.shape[1:])
    return view.copy_(pool)


LAYOUTS = {
    "pages": page_padded,
    "columns_first": lambda pool: pool.mT.contiguous().mT,
    "heads_first": lambda pool: pool.transpose(0, 1).contiguous().transpose(0, 1),
    "layers": lambda pool: torch.stack((pool, pool), 1)[:, 1],
    "backing_of_two": lambda pool: torch.stack((pool, pool), -1)[..., 0],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_pools_of_any_strides(package, inputs, name) -> None:
    """Pages with padding, either order of a state's dims, and a layer's share of a pool of all layers."""
    plain = filled(inputs, {5: 0, 2: 1, 0: 2}, torch.bfloat16)
    pool = LAYOUTS[name](plain)
    assert not pool.is_contiguous()
    storage = pool.as_strided((pool.untyped_storage().nbytes() // 2,), (1,), 0)
    before, indices = storage.clone(), ints(5, 2, 0, like=pool)
    operands = operands_of(inputs)
    for given in (pool, plain):
        package.m2rnn(**tokens(operands, slice(2)), pool=given, indices=indices)
        package.m2rnn_step(**tokens(operands, 2), state=given, indices=indices)
    assert same_bits(pool, plain)
    mask = torch.zeros_like(storage, dtype=torch.bool)
    touched = mask.as_strided(pool.shape, pool.stride(), pool.storage_offset())
    touched[indices.long()] = True
    assert same_bits(storage[~mask], before[~mask])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_states_go_to_slots_of_their_own(package, inputs, dtype) -> None:
    """Slots to read and to write may differ and be columns of a table; a negative one is not written."""
    pool = filled(inputs, {5: 0, 2: 1, 0: 2})
    before, token = pool.clone(), tokens(operands_of(inputs), 0)
    table = ints([5, 1], [2, -1], [0, 6], dtype=dtype, like=pool)
    y, _ = package.m2rnn_step(**token, state=pool, indices=table[:, 0], out_indices=table[:, 1])
    expected, state = package.m2rnn_step(**token, state=inputs.initial_state.clone())
    assert same_bits(y, expected)
    assert same_bits(pool[[1, 6]], state[::2])
    assert same_bits(others(pool, 1, 6), others(before, 1, 6))


def test_slots_that_no_pool_has_are_skipped(package, inputs) -> None:
    """Kernels stay inside the pool whatever the indices: what is out of range is treated as a negative one."""
    pool = filled(inputs, {1: 1})
    y, _ = package.m2rnn_step(**tokens(operands_of(inputs), 0), state=pool, indices=ints(SLOTS, 1, 1 << 30, like=pool))
    assert bool((y[::2] == 0).all())
    assert untouched(others(pool, 1))
    assert bool(pool[1].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fp32", "softplus_bf16", "two_row_blocks"])
def test_tokens_together_are_tokens_one_by_one(package, device, name, dtype) -> None:
    """T tokens of a call have the bits of T calls, and leave the state after each in its slot, or in none."""
    inputs = draw(device, name, batch=2)
    pool, single = (filled(inputs, {0: 0, 3: 1}, dtype) for _ in range(2))
    operands, start = operands_of(inputs), ints(0, 3, like=pool)
    table = ints([1, -1, 2], [6, 5, 3], like=pool)
    y, _ = package.m2rnn_steps(**operands, pool=pool, indices=start, out_indices=table)
    states = []
    for t in range(STEPS):
        expected, _ = package.m2rnn_step(**tokens(operands, t), state=single, indices=start)
        assert same_bits(y[:, t], expected)
        states.append(single[[0, 3]])
    kept = [states[0][0], states[2][0], *(state[1] for state in states)]
    assert same_bits(pool[[1, 2, 6, 5, 3]], torch.stack(kept))
    assert same_bits(pool[0], inputs.initial_state[0].to(dtype))
    assert untouched(pool[4])


def test_the_last_state_alone(package, inputs) -> None:
    """With one slot a request, or none to write to, only the state after the last token is kept."""
    operands, indices = operands_of(inputs), ints(0, 1, 2, like=inputs.q)
    one, other = (filled(inputs, {0: 0, 1: 1, 2: 2}) for _ in range(2))
    y, _ = package.m2rnn_steps(**operands, pool=one, indices=indices)
    package.m2rnn_steps(**operands, pool=other, indices=indices, out_indices=ints(5, -1, 6, like=inputs.q))
    assert same_bits(other[[5, 6]], one[[0, 2]])
    assert same_bits(other[:3], inputs.initial_state)
    expected, state = package.m2rnn(**operands, initial_state=inputs.initial_state)
    assert_close({"y": y, "state": one[:3]}, {"y": expected, "state": state}, 1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_accepted_tokens_choose_where_the_next_call_starts(package, inputs, dtype) -> None:
    """A call after drafts starts from the state of the last that was accepted; none or too many of them skip."""
    pool = filled(inputs, {0: 0, 4: 1, 6: 2})
    operands = tokens(operands_of(inputs), slice(2))
    table = ints([0, 1], [3, 4], [6, 5], dtype=dtype, like=pool)
    before = pool.clone()
    y, _ = package.m2rnn_steps(**operands, pool=pool, indices=table, accepted=ints(1, 2, 0, dtype=dtype, like=pool))
    expected = before.clone()
    rows, _ = package.m2rnn_steps(**operands, pool=expected, indices=ints(0, 4, -1, like=pool), out_indices=table.int())
    assert same_bits(y, rows)
    assert same_bits(pool, expected)
    assert bool((y[2] == 0).all())
    package.m2rnn_steps(**operands, pool=pool, indices=table, accepted=ints(3, 99, -1, dtype=dtype, like=pool))
    assert same_bits(pool, expected)


@pytest.mark.parametrize(("name", "dtype"), [*zip(("fp32", "softplus_bf16", "masked_fp16"), DTYPES, strict=True)])
@pytest.mark.parametrize("packs", [False, True], ids=["dense", "packed"])
def test_a_prompt_leaves_its_state_in_its_slot(package, device, name, dtype, packs) -> None:
    """A prompt starts from its slot or from zeros, and its final state is rounded once to its slot, in place."""
    inputs = draw(device, name)
    pool = filled(inputs, {5: 0, 2: 1}, dtype)
    operands = operands_of(packed(inputs) if packs else inputs)
    offsets = {"cu_seqlens": torch.arange(BATCH + 1, device=device) * STEPS} if packs else {}
    indices, has = ints(5, 2, -1, like=pool), torch.tensor([True, False, True], device=device)
    y, returned = package.m2rnn(**operands, **offsets, pool=pool, indices=indices, has_initial_state=has)
    first = inputs.initial_state.to(dtype).float()
    first[1:] = 0
    expected, state = package.m2rnn(**operands, **offsets, initial_state=first)
    assert returned is pool
    assert same_bits(y, expected)
    assert same_bits(pool[[5, 2]], state[:2].to(dtype))
    assert untouched(others(pool, 5, 2))


def test_prompts_swap_slots(package, inputs) -> None:
    """All states are read before any is written; a final state goes to a slot of its own, or to none."""
    pool = filled(inputs, {0: 0, 1: 1, 2: 2})
    operands = operands_of(inputs)
    _, nothing = package.m2rnn(
        **operands, pool=pool, indices=ints(0, 1, 2, like=pool), out_indices=ints(1, 0, -1, like=pool),
        output_final_state=False,
    )  # fmt: skip
    _, state = package.m2rnn(**operands, initial_state=inputs.initial_state)
    assert nothing is None
    assert same_bits(pool[[1, 0]], state[:2])
    assert same_bits(pool[2], inputs.initial_state[2])


def test_no_requests_and_no_tokens(package, inputs) -> None:
    """Batches of none, of requests or of tokens, give empty results."""
    pool = filled(inputs, {0: 0})
    before, operands = pool.clone(), operands_of(inputs)
    none = ints(like=pool)
    y, _ = package.m2rnn_step(**requests(tokens(operands, 0), slice(0)), state=pool, indices=none)
    assert tuple(y.shape) == (0, 2, 4)
    y, _ = package.m2rnn_steps(**tokens(operands, slice(0)), pool=pool, indices=ints(0, 1, 2, like=pool))
    assert tuple(y.shape) == (3, 0, 2, 4)
    y, _ = package.m2rnn(**requests(operands, slice(0)), pool=pool, indices=none)
    assert tuple(y.shape) == (0, 3, 2, 4)
    assert same_bits(pool, before)


def test_operands_of_any_strides(package, inputs) -> None:
    """Slices of a fused projection give the same bits as their copies."""
    operands, indices = operands_of(inputs), ints(0, 1, 2, like=inputs.q)
    fused = {
        name: torch.cat([x, x.new_full(x.shape, torch.nan)], -1)[..., : x.shape[-1]] for name, x in operands.items()
    }
    fused["q"] = fused["q"].transpose(0, 1).contiguous().transpose(0, 1)
    pools = [filled(inputs, {0: 0, 1: 1, 2: 2}) for _ in range(2)]
    given, _ = package.m2rnn_steps(**fused, pool=pools[0], indices=indices)
    expected, _ = package.m2rnn_steps(**operands, pool=pools[1], indices=indices)
    assert same_bits(given, expected)
    assert same_bits(*pools)


def test_calls_alike_and_others(package, inputs) -> None:
    """Calls that agree in shapes but not in what their tensors hold are not mistaken for each other."""
    operands = tokens(operands_of(inputs), 0)
    for slots in ((0, 1, 2), (4, -1, 3), (2, 1, 0)):
        pool = filled(inputs, {slot: b for b, slot in enumerate(slots) if slot >= 0})
        y, _ = package.m2rnn_step(**operands, state=pool, indices=ints(*slots, like=pool))
        expected, state = package.m2rnn_step(**operands, state=inputs.initial_state.clone())
        rows = [b for b, slot in enumerate(slots) if slot >= 0]
        assert same_bits(y[rows], expected[rows])
        assert same_bits(pool[[slots[b] for b in rows]], state[rows])


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "float_indices": (
        {"indices": lambda x: x.float()}, TypeError, "indices must be torch.int32 or torch.int64, got torch.float32"
    ),
    "short_indices": ({"indices": lambda x: x[:2]}, ValueError, "indices must be (3,), got (2,)"),
    "list_of_indices": ({"indices": lambda x: x.tolist()}, TypeError, "indices must be a tensor, got list"),
    "indices_elsewhere": ({"indices": lambda x: x.to("meta")}, ValueError, "got meta"),
    "out_alone": (
        {"indices": lambda x: None, "out_indices": lambda x: torch.zeros(3).int()},
        TypeError,
        "indices must be a tensor, got NoneType",
    ),
    "short_out": (
        {"out_indices": lambda x: torch.zeros(2, dtype=torch.int32)}, ValueError, "out_indices must be (3,), got (2,)"
    ),
    "pool_shape": ({"state": lambda x: x[:, 1:]}, ValueError, "state must be (slots, 2, 4, 4), got (7, 1, 4, 4)"),
    "pool_dtype": (
        {"state": lambda x: x.double()},
        TypeError,
        "state must be torch.float32, torch.bfloat16 or torch.float16, got torch.float64",
    ),
    "no_pool": ({"state": lambda x: None}, TypeError, "state must be a tensor, got NoneType"),
    "overlap": (
        {"state": lambda x: x[:1].expand(7, -1, -1, -1)},
        RuntimeError,
        "more than one element of the written-to tensor refers to a single memory location",
    ),
    "seed_of_float32": (
        {"rounding_seed": lambda x: 1},
        TypeError,
        "rounding_seed must come with a state in bfloat16 or float16, got torch.float32",
    ),
    "seed_dtype": ({"rounding_seed": lambda x: torch.ones(1)}, TypeError, "rounding_seed must be torch.int64, got"),
    "rank": ({"q": lambda x: x[:, None]}, ValueError, "q must be (B, Nq, K), got (3, 1, 1, 4)"),
    "gradient": ({"q": lambda x: x.clone().requires_grad_()}, RuntimeError, "q must not require a gradient"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls_say_what_was_expected_and_given(package, inputs, wrong) -> None:
    """One line names the argument, the expectation and what came instead; nothing is written."""
    changes, error, message = WRONG[wrong]
    pool = filled(inputs, {0: 0})
    before = pool.clone()
    call = {**tokens(operands_of(inputs), 0), "state": pool, "indices": ints(0, 1, 2, like=pool)}
    call.update({name: change(call.get(name)) for name, change in changes.items()})
    with pytest.raises(error, match=re.escape(message)) as caught:
        package.m2rnn_step(**call)
    assert str(caught.value).startswith("m2rnn_step: ")
    assert "\n" not in str(caught.value)
    assert same_bits(pool, before)


WRONG_STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "table_alone": ({"accepted": None}, "indices must be (3, C) with accepted and (3,) without, got (3, 3) without it"),
    "no_table": ({"indices": [0, 1, 2]}, "indices must be (3, C) with accepted and (3,) without, got (3,) with it"),
    "batch": ({"indices": [[0, 1, 2]]}, "indices must be (3,), or (3, C) with accepted, got (1, 3)"),
    "accepted": ({"accepted": [1, 1]}, "accepted must be (3,), got (2,)"),
    "out": ({"out_indices": [[0, 1]] * 3}, "out_indices must be (3, 3) or (3,), got (3, 2)"),
    "no_out": ({"indices": [[0, 1]] * 3}, "out_indices must be given unless indices are (3, 3), got indices (3, 2)"),
}


@pytest.mark.parametrize("wrong", WRONG_STEPS)
def test_wrong_tables_of_slots(package, inputs, wrong) -> None:
    """The same of calls of several tokens."""
    changes, message = WRONG_STEPS[wrong]
    call: dict[str, Any] = {"indices": [[0, 1, 2]] * 3, "accepted": [1, 1, 1], **changes}
    slots = {name: None if x is None else ints(*x, like=inputs.q) for name, x in call.items()}
    with pytest.raises(ValueError, match=f"^m2rnn_steps: {re.escape(message)}$"):
        package.m2rnn_steps(**operands_of(inputs), pool=filled(inputs, {}), **slots)


WRONG_PROMPTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no_pool": ({"pool": None}, ValueError, "indices must come with a pool, got none"),
    "no_indices": ({"indices": None}, TypeError, "indices must be a tensor, got NoneType"),
    "two_states": ({"initial_state": torch.zeros(3, 2, 4, 4)}, ValueError, "initial_state must not come with a pool"),
    "backend": ({"backend": "reference"}, ValueError, "backend must be kernels with a pool, got 'reference'"),
    "has": ({"has_initial_state": torch.ones(3)}, TypeError, "has_initial_state must be torch.bool, got torch.float32"),
    "has_shape": ({"has_initial_state": torch.ones(2).bool()}, ValueError, "has_initial_state must be (3,), got (2,)"),
}


@pytest.mark.parametrize("wrong", WRONG_PROMPTS)
def test_wrong_prompts(package, inputs, wrong) -> None:
    """The same of ``m2rnn``."""
    changes, error, message = WRONG_PROMPTS[wrong]
    call = {"pool": filled(inputs, {}), "indices": ints(0, 1, 2, like=inputs.q), **changes}
    with pytest.raises(error, match=f"^m2rnn: {re.escape(message)}"):
        package.m2rnn(**operands_of(inputs), **call)


@pytest.mark.parametrize("name", PER_TOKEN)
def test_prompts_into_pools_have_no_gradients(package, inputs, name) -> None:
    """A prompt whose operand wants a gradient raises; under ``no_grad`` it does not."""
    operands, pool = operands_of(inputs), filled(inputs, {})
    operands[name].requires_grad_()
    call = {"pool": pool, "indices": ints(0, 1, -1, like=pool), "has_initial_state": torch.zeros(3).bool()}
    call = {key: x.to(pool.device) for key, x in call.items()}
    with pytest.raises(RuntimeError, match=f"^m2rnn: {name} must not require a gradient"):
        package.m2rnn(**operands, **call)
    with torch.no_grad():
        y, _ = package.m2rnn(**operands, **call)
    assert not y.requires_grad


EVERY = 6
"""Steps between the states that the package's forward saves."""


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("packs", [False, True], ids=["dense", "packed"])
def test_states_every_so_many_tokens(package, device, name, dtype, packs) -> None:
    """A prompt leaves what its beginnings would, where it is long enough and there is a slot, and its final state."""
    lengths = (13, 2 * EVERY, 5) if packs else (13, 13, 13)
    problem = Problem(BATCH, 13, lengths if packs else None, initial_state=True)
    inputs = make_inputs(VARIANTS[name], problem, seed=2).to(device)
    operands, pool = operands_of(inputs), poisoned(12, inputs, dtype)
    pool[:BATCH] = inputs.initial_state.to(dtype)
    offsets = {"cu_seqlens": inputs.cu_seqlens} if packs else {}
    y, _ = package.m2rnn(
        **operands, **offsets, pool=pool, indices=ints(0, 1, 2, like=pool), out_indices=ints(3, 4, -1, like=pool),
        states_every=EVERY, states_indices=ints([5, 6, 7], [-1, 8, 9], [10, 11, -1], dtype=torch.int64, like=pool),
    )  # fmt: skip
    first = inputs.initial_state.to(dtype).float()
    expected, last = package.m2rnn(**operands, **offsets, initial_state=first)
    assert same_bits(y, expected)
    assert same_bits(pool[[3, 4]], last[:2].to(dtype))
    kept = {(0, 6): 5, (0, 12): 6, (1, 12): 8} | ({} if packs else {(2, 6): 10, (2, 12): 11})
    for (b, count), slot in kept.items():
        start = sum(lengths[:b])
        part = {
            n: (x[None, start : start + count] if packs else x[b : b + 1, :count]) if n in PER_TOKEN else x
            for n, x in operands.items()
        }
        _, state = package.m2rnn(**part, initial_state=first[b : b + 1])
        assert same_bits(pool[slot], state[0].to(dtype)), (b, count)
    assert untouched(others(pool, 0, 1, 2, 3, 4, *kept.values()))


@pytest.mark.parametrize("every", [384 * 2**22, 6 * 2**30])
def test_states_after_more_tokens_than_there_are(package, inputs, every) -> None:
    """Multiples beyond 32 bits are as far off as any that no sequence reaches: nothing is read or left."""
    pool = poisoned(8, inputs, torch.float32)
    pool[:3] = 0.0
    slots = {"indices": ints(0, 1, 2, like=pool), "states_indices": ints([3, 4], [5, 6], [-1, 7], like=pool)}
    package.m2rnn(**operands_of(inputs), pool=pool, states_every=every, **slots)
    assert untouched(others(pool, 0, 1, 2))


WRONG_STATES: dict[str, tuple[dict[str, Any], str]] = {
    "between": (
        {"states_every": 4},
        "states_every must be a multiple of the 6 steps between the kernels' states, got 4",
    ),
    "none": ({"states_every": 0}, "states_every must be a number of tokens, got 0"),
    "alone": (
        {"states_indices": None},
        "states_every and states_indices must be given together, got only states_every",
    ),
    "flat": ({"states_indices": [0, 1, 2]}, "states_indices must be (3, M), got (3,)"),
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_wrong_states_to_keep(package, inputs, wrong) -> None:
    """The same of states after so many tokens."""
    changes, message = WRONG_STATES[wrong]
    call = {"states_every": EVERY, "states_indices": [[3], [4], [5]], **changes}
    if call["states_indices"] is not None:
        call["states_indices"] = ints(*call["states_indices"], like=inputs.q)
    pool = filled(inputs, {0: 0, 1: 1, 2: 2})
    with pytest.raises(ValueError, match=f"^m2rnn: {re.escape(message)}$"):
        package.m2rnn(**operands_of(inputs), pool=pool, indices=ints(0, 1, 2, like=pool), **call)


def test_384_tokens_are_a_multiple_of_any_kernels_steps() -> None:
    """The documents promise it of ``states_every``, whatever schedule a search finds."""
    intervals = {
        value
        for family in FAMILIES
        for device in TARGETS.values()
        for variant in (make_variant(64, 64, dtype="bf16"), make_variant(64, 16, dtype="bf16"))
        if not family.unsupported(variant, device)
        for value in dict(family.axes(variant, device))["interval"]
    }
    assert {8, 16, 128} <= intervals
    assert all(384 % interval == 0 for interval in intervals)
