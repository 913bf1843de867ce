"""A state that ``m2rnn_step`` writes in place must not share memory with itself or with operands."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
from calls import Spy, assert_alike, operators_of
from support import make_variant
from torch import Tensor

from m2gen.problem import Problem, make_inputs

BATCH = 2
SHAPE = (BATCH, 2, 16, 16)
DENSE = (512, 256, 16, 1)
ITSELF = "unsupported operation: more than one element of the written-to tensor refers to a single memory location"
ANOTHER = "unsupported operation: some elements of the input tensor and the written-to tensor refer to a single memory"


@pytest.fixture
def call(device: torch.device) -> dict[str, Tensor]:
    """Return the operands of one step, without a state."""
    inputs = make_inputs(make_variant(), Problem(BATCH, 1), seed=7).to(device)
    return {
        name: x[:, 0] if name != "weight" else x
        for name in ("q", "k", "v", "weight", "forget")
        for x in [getattr(inputs, name)]
    }


SHARED = {
    "batch": lambda memory: memory[:1].expand(SHAPE),
    "heads": lambda memory: memory[:, :1].expand(SHAPE),
    "rows": lambda memory: memory[:, :, :1].expand(SHAPE),
    "columns": lambda memory: memory[..., :1].expand(SHAPE),
    "all": lambda memory: memory[:1, :1, :1, :1].expand(SHAPE),
    "next row overlaps": lambda memory: memory.as_strided(SHAPE, (512, 256, 8, 1)),
    "heads a row apart": lambda memory: memory.as_strided(SHAPE, (512, 16, 16, 1)),
    "windows": lambda memory: memory.flatten().unfold(0, 512, 16)[:BATCH].unflatten(1, SHAPE[1:]),
    "rows and columns": lambda memory: memory.as_strided(SHAPE, (512, 256, 3, 2)),
}
"""States some of whose elements are one place in memory."""
OWN = {
    "dense": lambda memory: memory,
    "transposed": lambda memory: memory.transpose(2, 3),
    "heads first": lambda memory: memory.new_zeros(2, BATCH, 16, 16).transpose(0, 1),
    "padded pages": lambda memory: memory.new_zeros(BATCH, 600)[:, 40:552].unflatten(1, SHAPE[1:]),
    "every other row": lambda memory: memory.new_zeros(BATCH, 2, 32, 16)[:, :, ::2],
    "a slice of layers": lambda memory: memory.new_zeros(BATCH, 3, 2, 16, 16)[:, 1],
    "diagonal": lambda memory: memory.new_zeros(2, 16, 16, BATCH, BATCH).diagonal(dim1=3, dim2=4).movedim(-1, 0),
    "steps that do not nest": lambda memory: memory.new_zeros(4096).as_strided(SHAPE, (2048, 1024, 17, 16)),
}
"""States that no two sequences, heads, rows or columns share."""


def through(package: ModuleType, call: dict[str, Tensor], state: Tensor, path: str) -> Tensor:
    """Run a step with or without torch's dispatcher."""
    if path == "direct":
        y, _ = package.m2rnn_step(**call, state=state)
        return y
    operands = [call[name] for name in ("q", "k", "v", "weight", "forget")]
    y = operators_of(package).STEP(*operands, None, None, state)
    assert isinstance(y, Tensor)
    return y


@pytest.mark.parametrize("path", ["direct", "dispatched"])
@pytest.mark.parametrize("name", SHARED)
def test_a_state_that_shares_memory_with_itself(package, call, device, monkeypatch, name, path) -> None:
    """torch's own error is raised before anything is written, each time."""
    memory = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    before, state = memory.clone(), SHARED[name](memory)
    spy = Spy(package, monkeypatch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=ITSELF):
            through(package, call, state, path)
    assert spy.launched == []
    assert torch.equal(memory, before)


@pytest.mark.parametrize("path", ["direct", "dispatched"])
@pytest.mark.parametrize("name", OWN)
def test_a_state_of_its_own(package, call, device, name, path) -> None:
    """Views whose elements are all apart are advanced as their copies are."""
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    state, copy = OWN[name](values.clone()).copy_(values), values.clone()
    for _ in range(2):
        y, expected = through(package, call, state, path), through(package, call, copy, path)
        assert_alike({"y": y, "state": state}, {"y": expected, "state": copy}, device)


def test_whatever_torch_refuses_is_refused(package) -> None:
    """Exactly those small strides are found with which two elements share memory; torch finds fewer."""
    memory = operators_of(package).memory
    shape = (2, 3, 2)
    for strides in itertools.product(range(7), repeat=3):
        indices = itertools.product(*map(range, shape))
        places = [sum(i * step for i, step in zip(index, strides, strict=True)) for index in indices]
        shared = len(set(places)) < len(places)
        assert memory.overlaps_itself(shape, strides) == shared, strides
        try:
            torch.zeros(32).as_strided(shape, strides).fill_(1.0)
        except RuntimeError:
            assert shared, strides
    assert not memory.overlaps_itself((0, 3), (0, 0))
    assert not memory.overlaps_itself((1, 3), (0, 1))


ALIASED = {
    "q": lambda state: state[:, :1, 0],
    "v": lambda state: state[:, :, 3],
    "weight": lambda state: state[0],
    "forget": lambda state: state[:, :, 15, 15],
    "k": lambda state: state[:, :1, :, 15],
}
"""Operands that lie in the state."""


@pytest.mark.parametrize("path", ["direct", "dispatched"])
@pytest.mark.parametrize("name", ALIASED)
def test_an_operand_in_the_state(package, call, device, monkeypatch, name, path) -> None:
    """A program would read what another has written: torch's error for that names both."""
    state = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    through(package, call, state, path)
    before, spy = state.clone(), Spy(package, monkeypatch)
    with pytest.raises(RuntimeError, match=f"^m2rnn_step: state and {name}: {ANOTHER}"):
        through(package, {**call, name: ALIASED[name](state)}, state, path)
    assert spy.launched == []
    assert torch.equal(state, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_in_one_buffer(package, dtype) -> None:
    """Tensors may begin before what is written, in it or behind it; exactly those that share some are refused."""
    memory, buffer = operators_of(package).memory, torch.zeros(24, dtype=dtype)
    state = buffer[8:16]
    for size in (0, 1, 4, 12):
        for start in range(24 - size):
            x = buffer[start : start + size]
            shared = size > 0 and start < 16 and start + size > 8
            places = memory.Places(state, [None, x])
            assert places.meet([0, x.data_ptr(), state.data_ptr()]) == shared
            for known in (None, places):
                with pytest.raises(RuntimeError, match="state and q") if shared else nullcontext():
                    memory.check_written("m2rnn_step", "state", state, {"k": None, "q": x}, known)


def test_what_lies_among_the_states_elements_is_known_by_name_and_place(package) -> None:
    """One operand shares nothing there, which says nothing of another one, nor of the same one at another place."""
    memory, buffer = operators_of(package).memory, torch.zeros(16)
    state, apart = buffer.view(8, 2)[:, 0], buffer.view(8, 2)[:4, 1]
    known = memory.check_written("m2rnn_step", "state", state, {"q": apart})
    memory.check_written("m2rnn_step", "state", state, {"q": apart}, known)
    with pytest.raises(RuntimeError, match="state and q"):
        memory.check_written("m2rnn_step", "state", state, {"q": buffer.view(8, 2)[:4, 0]}, known)
    with pytest.raises(RuntimeError, match="state and k"):
        memory.check_written("m2rnn_step", "state", state, {"q": apart, "k": buffer[1:3]})


def test_a_buffer_of_operands_and_state(package, call, device) -> None:
    """Slots of one buffer, a sequence's next to each other, interleave and share nothing."""
    state = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    expected, _ = package.m2rnn_step(**call, state=state.clone())
    slots = torch.zeros(BATCH, 16 + 512 + 32, device=device)
    q, inner, v = slots.split([16, 512, 32], 1)
    q.copy_(call["q"].flatten(1))
    v.copy_(call["v"].flatten(1))
    inner.copy_(state.flatten(1))
    given = {**call, "q": q.unflatten(1, (1, 16)), "v": v.unflatten(1, (2, 16))}
    for _ in range(2):
        inner.copy_(state.flatten(1))
        y, _ = package.m2rnn_step(**given, state=inner.unflatten(1, SHAPE[1:]))
        assert torch.equal(y, expected)


def test_pages_are_found_apart_only_where_they_are(package) -> None:
    """What is said to lie in other parts of pages shares no byte, and parts of nested pages are found."""
    memory, buffer, found = operators_of(package).memory, torch.zeros(128, dtype=torch.uint8), 0
    one = buffer.view(torch.float32).as_strided((3, 2), (6, 2), 2)
    of_one = set(memory._bytes(one).tolist())
    for outer, inner, offset in itertools.product(range(14), range(5), range(30)):
        other = buffer.view(torch.int16).as_strided((3, 2), (outer, inner), offset)
        if memory.in_other_parts(one, other, other.data_ptr() - one.data_ptr()):
            found += 1
            assert not of_one & set(memory._bytes(other).tolist()), (outer, inner, offset)
    assert found > 100


def test_a_pool_in_pages_is_not_looked_at_byte_by_byte(package, monkeypatch) -> None:
    """States and inputs of the convolution that share each request's page: looking at 100 slots' bytes took minutes."""
    memory, page, slots = operators_of(package).memory, 600_000, 100
    buffer = torch.empty(slots * page, dtype=torch.uint8)
    state = buffer.view(torch.float32).as_strided((slots, 132, 64, 16), (page // 4, 1024, 16, 1), 8)
    conv = buffer.view(torch.bfloat16).as_strided((slots, 3, 2240), (page // 2, 2240, 1), 280_000)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_bytes", lambda x: pytest.fail("looked at every byte"))
        memory.check_written("M2RNN", "cache.state", state, {"cache.conv": conv})
    few = slice(0, 2)
    below = buffer.view(torch.bfloat16).as_strided((slots, 3, 2240), (page // 2, 2240, 1), 2 * 135_176 - 1)
    with pytest.raises(RuntimeError, match=ANOTHER):  # by its first element, which is half of the state's last one
        memory.check_written("M2RNN", "cache.state", state[few], {"cache.conv": below[few]})


def test_a_compiled_step_checks_its_state(package, call, device) -> None:
    """The compiler hands over the state it was given, which is looked at then."""
    compiled = torch.compile(package.m2rnn_step, fullgraph=True, backend="aot_eager")
    state = torch.zeros(1, *SHAPE[1:], device=device).expand(SHAPE)
    with pytest.raises(RuntimeError, match="single memory location"):
        compiled(**call, state=state)
    assert not state.any()
