"""The results, operands and saved tensors of the generated operator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calls import Spy, assert_same, differentiate, module_of
from support import SCHEDULES, STEPS, build_package, import_package, make_variant

from m2gen.problem import Problem, make_inputs

INTERVAL = SCHEDULES["one_level_atomic"].interval


def test_what_a_package_exports(package) -> None:
    """The names that the documentation imports, and no others."""
    assert sorted(package.__all__) == [
        "Initialisation", "M2RNN", "M2RNNCache", "M2RNNPool", "VariantNotBuiltError", "layers", "m2rnn", "m2rnn_step",
        "m2rnn_steps", "parameter_groups", "warm_up",
    ]  # fmt: skip
    assert all(getattr(package, name).__doc__ for name in package.__all__)
    assert issubclass(package.VariantNotBuiltError, ValueError)


def test_the_operands_are_read_only(package, operands) -> None:
    """A call leaves all operands as they were, and returns a state of its own."""
    before = {name: x.clone() for name, x in operands.items()}
    _, state = package.m2rnn(**operands)
    assert all(torch.equal(operands[name], x) for name, x in before.items())
    assert state.data_ptr() != operands["initial_state"].data_ptr()


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "no leaf", "gradients"])
def test_checkpoints_are_saved_only_for_gradients(package, operands, monkeypatch, mode) -> None:
    """Without a gradient to compute, the forward allocates no checkpoints."""
    spy = Spy(package, monkeypatch)
    leaves = {name: x.detach().requires_grad_(mode != "no leaf") for name, x in operands.items()}
    contexts = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with contexts.get(mode, torch.enable_grad)():
        package.m2rnn(**leaves)
    ((_, _, checkpoints),) = spy.results["forward"]
    assert (None if checkpoints is None else checkpoints.shape[0]) == (
        -(-STEPS // INTERVAL) if mode == "gradients" else None
    )


def test_the_final_state_may_be_left_out(package, operands) -> None:
    """Without output_final_state, None stands in its place, and y is the same."""
    y, state = package.m2rnn(**operands, output_final_state=False)
    assert state is None
    assert torch.equal(y, package.m2rnn(**operands)[0])


def test_a_second_copy_under_another_name(tmp_path: Path, device) -> None:
    """Two copies of one package in one process share operators and give the same bits."""
    package = build_package("copied", [make_variant()], SCHEDULES["one_step_partial"])
    one, two = (import_package(tmp_path / name, package, f"m2gen_test_{name}") for name in ("one", "two"))
    inputs = make_inputs(make_variant(), Problem(1, 2, initial_state=True), seed=0).to(device)
    assert one.m2rnn is not two.m2rnn
    assert module_of(one, "library").NAMESPACE == module_of(two, "library").NAMESPACE
    assert_same(differentiate(one.m2rnn, inputs), differentiate(two.m2rnn, inputs))


def test_the_clip_is_one_unless_said(package, device) -> None:
    """The default bound is 1, None is no bound, and 0 lets nothing through."""
    inputs = make_inputs(make_variant(), Problem(1, 3, initial_state=True), seed=0).to(device)
    default, one, none = (differentiate(package.m2rnn, inputs, **c) for c in ({}, {"clip": 1}, {"clip": None}))
    assert_same(default, one)
    assert not torch.equal(default["dk"], none["dk"])
    assert_same(none, differentiate(package.m2rnn, inputs, clip=float("inf")))
