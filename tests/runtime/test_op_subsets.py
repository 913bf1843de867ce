"""Gradients of any subset of the operands: the same as all at once, and nothing computed for the others."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from calls import DIFFERENTIABLE, GATE, Spy, arguments, assert_same, differentiate
from support import GATED_HEADS, OPERANDS, make_variant
from torch import Tensor

from m2gen.problem import Inputs, Problem, make_inputs

GIVEN = make_variant(heads=(1, 2, 4, 2, 4))
COMPUTED = make_variant(heads=GATED_HEADS, gate="softplus")
LARGER = [("q", "weight"), ("k", "v", "forget"), ("q", "initial_state"), OPERANDS[:5], ("forget", "initial_state")]
LARGER_COMPUTED = [GATE, ("forget", "A_log"), ("q", "dt_bias"), ("weight", "forget", *GATE)]


@pytest.fixture(scope="module")
def inputs(device: torch.device) -> Inputs:
    """Return the operands of one short sequence."""
    return make_inputs(GIVEN, Problem(1, 3, initial_state=True), seed=4).to(device)


@pytest.fixture(scope="module")
def computed(device: torch.device) -> Inputs:
    """Return operands of a call whose gate the kernel computes."""
    return make_inputs(COMPUTED, Problem(1, 3, initial_state=True), seed=4).to(device)


@pytest.fixture(scope="module")
def package(modules) -> ModuleType:
    """Return a package whose sums do not depend on the order of programs."""
    return modules("two_level_partial", "carry")


@pytest.fixture(scope="module")
def every(package, inputs, computed):
    """Return the gradients of all operands, for a given gate and for a computed one."""
    return {"given": differentiate(package.m2rnn, inputs), "computed": differentiate(package.m2rnn, computed)}


def _tensors(results: object) -> list[Tensor]:
    """Return the tensors with elements among what an operator returned."""
    flat = results if isinstance(results, (tuple, list)) else (results,)
    return [x for x in flat if isinstance(x, Tensor) and x.numel()]


@pytest.mark.parametrize("wanted", [*((name,) for name in OPERANDS), *LARGER], ids=" ".join)
def test_any_subset(package, inputs, every, monkeypatch, wanted) -> None:
    """Each gradient has the bits that asking for all gives, and the backward returns no others."""
    spy = Spy(package, monkeypatch)
    given = differentiate(package.m2rnn, inputs, wanted)
    assert_same(given, {name: every["given"][name] for name in ("y", "state", *(f"d{name}" for name in wanted))})
    assert spy.names == ["FORWARD", "BACKWARD"]
    assert len(_tensors(spy.results["BACKWARD"][0])) == len(wanted)


@pytest.mark.parametrize("wanted", [*((name,) for name in DIFFERENTIABLE), *LARGER_COMPUTED], ids=" ".join)
def test_any_subset_with_a_computed_gate(package, computed, every, monkeypatch, wanted) -> None:
    """The same where the kernel computes the gate, whose parameters have gradients too."""
    spy = Spy(package, monkeypatch)
    given = differentiate(package.m2rnn, computed, wanted)
    assert_same(given, {name: every["computed"][name] for name in ("y", "state", *(f"d{name}" for name in wanted))})
    assert len(_tensors(spy.results["BACKWARD"][0])) == len(wanted)


def test_without_any_gradient_no_backward_is_recorded(package, inputs, monkeypatch) -> None:
    """Operands that need no gradient give results that need none."""
    spy = Spy(package, monkeypatch)
    y, state = package.m2rnn(**{name: x.detach() for name, x in arguments(inputs).items()})
    assert not y.requires_grad
    assert not state.requires_grad
    assert spy.launched == ["forward"]
    assert spy.names == []  # no operator of torch's, so nothing that could record


def test_results_that_nobody_differentiates_cost_nothing(package, inputs, monkeypatch) -> None:
    """A gradient of y alone hands the backward no gradient of the state, and the other way round."""
    leaf = inputs.q.detach().requires_grad_()
    operands = arguments(inputs) | {"q": leaf}
    for result in (0, 1):
        outputs = package.m2rnn(**operands)
        (gradient,) = torch.autograd.grad(outputs[result].sum(), leaf)
        assert gradient.shape == leaf.shape
        assert bool(gradient.any()) == (result == 0)  # the final state does not depend on q
