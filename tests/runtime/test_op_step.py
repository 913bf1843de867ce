"""Decoding: one token at a time, the state updated in place."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import Spy, arguments, distance
from support import GATED_HEADS, make_variant
from torch import Tensor

from m2gen.problem import Inputs, Problem, make_inputs
from m2gen.variant import Variant

BATCH, STEPS, PREFILL = 2, 5, 2
VARIANTS = {
    "fp32": make_variant(),
    "bf16": make_variant(dtype="bf16"),
    "fp16": make_variant(dtype="fp16"),
    "masked": make_variant(24, 17),
    "masked_bf16": make_variant(9, 9, dtype="bf16"),
    "two_row_blocks": make_variant(32, 16),
    "grouped": make_variant(heads=(2, 4, 4, 1, 2)),
    "softplus": make_variant(heads=GATED_HEADS, gate="softplus"),
    "softplus_bf16": make_variant(heads=GATED_HEADS, dtype="bf16", gate="softplus"),
}
# A step rounds where the full call does, but may sum in another order; a bf16 operand of the next step then rounds
# to a neighbour now and then.
TOLERANCE = {"fp32": 1e-6, "bf16": 2.0**-8, "fp16": 2.0**-11}


@pytest.fixture
def package(modules) -> ModuleType:
    """Return an imported package."""
    return modules("two_level_partial", "carry")


def token(inputs: Inputs, t: int) -> dict[str, Tensor]:
    """Return the operands of step t, as ``m2rnn_step`` takes them."""
    named = arguments(inputs, ("q", "k", "v", "weight", "forget", "A_log", "dt_bias"))
    return {name: x[:, t] if name in ("q", "k", "v", "forget") else x for name, x in named.items()}


def prefix(inputs: Inputs, steps: int) -> dict[str, Tensor]:
    """Return the operands of the first steps, as ``m2rnn`` takes them."""
    return {name: x[:, :steps] if name in ("q", "k", "v", "forget") else x for name, x in arguments(inputs).items()}


def draw(variant: Variant, device: torch.device, batch: int = BATCH) -> Inputs:
    """Return a few sequences with initial states."""
    return make_inputs(variant, Problem(batch, STEPS, initial_state=True), seed=7).to(device)


@pytest.fixture
def call(device) -> dict[str, Tensor]:
    """Return the operands of one step, with a state."""
    inputs = draw(VARIANTS["fp32"], device)
    return {**token(inputs, 0), "state": inputs.initial_state.clone()}


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_steps_equal_the_full_call(package, device, name) -> None:
    """The state of a prefill, updated token by token, gives the outputs and the state of one call."""
    variant = VARIANTS[name]
    inputs = draw(variant, device)
    y, last = package.m2rnn(**prefix(inputs, STEPS))
    first, state = package.m2rnn(**prefix(inputs, PREFILL))
    place, outputs = state.data_ptr(), [first]
    for t in range(PREFILL, STEPS):
        y_t, returned = package.m2rnn_step(**token(inputs, t), state=state)
        assert returned is state
        assert (y_t.shape, y_t.dtype) == (y[:, t].shape, y.dtype)
        outputs.append(y_t.unsqueeze(1))
    assert state.data_ptr() == place
    assert distance(torch.cat(outputs, 1), y) <= TOLERANCE[variant.dtype]
    assert distance(state, last) <= TOLERANCE[variant.dtype]


def test_the_state_is_updated_in_place_and_nothing_else_is(package, call) -> None:
    """The step writes its state, and leaves its other operands as they were."""
    before = {name: x.clone() for name, x in call.items()}
    package.m2rnn_step(**call)
    assert not torch.equal(call["state"], before.pop("state"))
    assert all(torch.equal(call[name], x) for name, x in before.items())


def test_the_update_is_seen_by_autograd(package, call) -> None:
    """A tensor saved for a backward and then overwritten by a step makes that backward fail, not lie."""
    factor = torch.ones((), device=call["state"].device, requires_grad=True)
    product = (call["state"] * factor).sum()
    with torch.no_grad():
        package.m2rnn_step(**call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_state_of_any_strides_is_updated(package, call) -> None:
    """The state may be a slice of a cache of all layers: that slice is updated, its neighbours are not."""
    cache = torch.full((BATCH, 3, *call["state"].shape[1:]), 7.0, device=call["state"].device)
    cache[:, 1] = call["state"]
    y, state = package.m2rnn_step(**{**call, "state": cache[:, 1]})
    expected_y, expected = package.m2rnn_step(**call)
    assert torch.equal(y, expected_y)
    assert torch.equal(state, expected)
    assert torch.equal(cache[:, 1], expected)
    assert bool((cache[:, ::2] == 7.0).all())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_bf16_state_is_rounded_at_the_end_of_a_step(package, device, name) -> None:
    """A step on a bf16 state computes what one on the same values in float32 does, and rounds only what it keeps."""
    inputs = draw(VARIANTS[name], device)
    narrow = inputs.initial_state.bfloat16()
    wide = narrow.float()
    y, state = package.m2rnn_step(**token(inputs, 0), state=narrow)
    expected, _ = package.m2rnn_step(**token(inputs, 0), state=wide)
    assert state is narrow
    assert torch.equal(y, expected)
    assert torch.equal(narrow, wide.bfloat16())


def test_operands_of_any_strides(package, call) -> None:
    """Slices of a fused projection give the same bits as their copies."""
    fused = {
        name: torch.cat([x, x.new_full(x.shape, float("nan"))], -1)[..., : x.shape[-1]] for name, x in call.items()
    }
    fused["state"] = call["state"].clone()
    given, expected = package.m2rnn_step(**fused), package.m2rnn_step(**call)
    assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))


def test_no_sequences(package, device) -> None:
    """A batch of none gives an empty result."""
    inputs = make_inputs(VARIANTS["fp32"], Problem(0, 1, initial_state=True), seed=0).to(device)
    y, state = package.m2rnn_step(**token(inputs, 0), state=inputs.initial_state)
    assert (tuple(y.shape), tuple(state.shape)) == ((0, 2, 16), (0, 2, 16, 16))


@pytest.mark.parametrize("name", ["q", "weight", "forget", "state"])
def test_gradients_are_refused(package, call, monkeypatch, name) -> None:
    """With gradients on, an operand that wants one is an error; without, it is not."""
    spy = Spy(package, monkeypatch)
    call[name].requires_grad_()
    with pytest.raises(RuntimeError, match=r"^m2rnn_step: "):
        package.m2rnn_step(**call)
    assert spy.launched == []
    with torch.no_grad():
        y, _ = package.m2rnn_step(**call)
    assert not y.requires_grad


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"q": lambda x: x[:, None]}, ValueError, "q must be (B, Nq, K), got (2, 1, 1, 16)"),
    "batch": ({"k": lambda x: x[:1]}, ValueError, "k must begin with (2,) as q does, got (1, 1, 16)"),
    "key_dim": ({"k": lambda x: x[..., 1:]}, ValueError, "k must end with q's K = 16, got (2, 1, 15)"),
    "gate": ({"forget": lambda x: x[..., None]}, ValueError, "forget must be (B, Nf), got (2, 2, 1)"),
    "weight": ({"weight": lambda x: x[:, 1:]}, ValueError, "weight must be (Nw, 16, 16), got (2, 15, 16)"),
    "dtype": ({"v": lambda x: x.half()}, TypeError, "v must be torch.float32, got torch.float16"),
    "device": ({"v": lambda x: x.to("meta")}, ValueError, "got meta"),
    "state_shape": ({"state": lambda x: x[:, 1:]}, ValueError, "state must be (2, 2, 16, 16), got (2, 1, 16, 16)"),
    "state_batch": ({"state": lambda x: x[:1]}, ValueError, "state must be (2, 2, 16, 16), got (1, 2, 16, 16)"),
    "state_dtype": (
        {"state": lambda x: x.half()},
        TypeError,
        "state must be torch.float32 or torch.bfloat16, got torch.float16",
    ),
    "state_device": ({"state": lambda x: x.to("meta")}, ValueError, "got meta"),
    "no_state": ({"state": lambda x: None}, TypeError, "state must be"),
    "one_parameter": ({"A_log": lambda x: torch.zeros(2)}, ValueError, "dt_bias"),
    "list": ({"q": lambda x: x.tolist()}, TypeError, "q must be"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls_say_what_was_expected_and_given(package, call, monkeypatch, wrong) -> None:
    """One line names the argument, the expectation and what came instead; nothing runs."""
    changes, error, message = WRONG[wrong]
    call.update({name: change(call.get(name)) for name, change in changes.items()})
    spy = Spy(package, monkeypatch)
    with pytest.raises(error, match=re.escape(message)) as caught:
        package.m2rnn_step(**call)
    assert str(caught.value).startswith("m2rnn_step: ")
    assert "\n" not in str(caught.value)
    assert spy.launched == []


def test_a_variant_that_is_not_built(package, device) -> None:
    """The error of a step names what was asked, as that of a call does."""
    inputs = make_inputs(make_variant(8, 8, (1, 1, 3, 3, 3)), Problem(1, 1, initial_state=True), seed=0).to(device)
    with pytest.raises(
        package.VariantNotBuiltError, match=r"^m2rnn_step: .*K=8, V=8, heads q: 1, k: 1, v: 3"
    ) as caught:
        package.m2rnn_step(**token(inputs, 0), state=inputs.initial_state)
    assert "\n" not in str(caught.value)
