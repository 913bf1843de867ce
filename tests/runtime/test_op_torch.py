"""The operator inside PyTorch: registration, opcheck, modules, checkpointing, inference, second derivatives."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import (
    DIFFERENTIABLE,
    assert_same,
    changed,
    operators_of,
    packed,
)
from layer import Mixer, make_layer, tokens, trained, with_gradients
from support import GATED_HEADS, STEPS, build_package, import_package, make_schedule, make_variant
from torch import Tensor

from m2gen.problem import Inputs, Problem, make_inputs

PLAIN, GATED = make_variant(), make_variant(heads=GATED_HEADS, gate="softplus")


def draw(device: torch.device, batch: int = 1, steps: int = 3, variant=PLAIN) -> Inputs:
    """Return operands of ``batch`` sequences."""
    return make_inputs(variant, Problem(batch, steps, initial_state=True), seed=batch + steps).to(device)


@pytest.fixture
def package(modules) -> ModuleType:
    """Return a package whose sums do not depend on the order of programs."""
    return modules("two_level_partial", "carry")


def test_operators_are_registered_under_a_name_of_their_own(package, modules) -> None:
    """Packages of different content register under different namespaces, each with all three operators."""
    libraries = [operators_of(module) for module in (package, modules("two_level_atomic", "carry"))]
    one, other = (library.NAMESPACE for library in libraries)
    assert one != other
    for library in libraries:
        for name in ("forward", "backward", "step"):
            operator = getattr(getattr(torch.ops, library.NAMESPACE), name).default
            assert operator is getattr(library, name.upper())
            assert str(operator) == f"{library.NAMESPACE}.{name}.default"


def _forward_arguments(inputs: Inputs, save: bool) -> tuple[Any, ...]:
    tensors = [getattr(inputs, name) for name in DIFFERENTIABLE]
    order = (*tensors[:5], *tensors[6:], tensors[5])  # the initial state comes after the gate's parameters
    operands = [x if x is None else x.clone().requires_grad_(save) for x in order]
    host = inputs.cu_seqlens.cpu().clone() if inputs.cu_seqlens is not None and save else None
    return (*operands, inputs.cu_seqlens, host, 1.0, save, False)


CASES = {
    "plain": lambda device: draw(device, steps=2),
    "packed": lambda device: packed(draw(device, batch=2, steps=1)),
    "softplus": lambda device: draw(device, steps=1, variant=GATED),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck_of_the_forward_and_its_gradients(package, device, name) -> None:
    """All of opcheck: schema, autograd registration, fake tensors, and ahead-of-time dispatch with dynamic shapes."""
    torch.library.opcheck(operators_of(package).FORWARD, _forward_arguments(CASES[name](device), True))


def test_opcheck_of_the_forward_without_gradients(package, device) -> None:
    """The same where nothing is saved."""
    torch.library.opcheck(operators_of(package).FORWARD, _forward_arguments(CASES["plain"](device), False))


@pytest.mark.parametrize("wanted", [(1,) * 5 + (0, 0, 1), (1, 0, 0, 0, 0, 0, 0, 0)], ids=["all", "q"])
def test_opcheck_of_the_backward(package, device, wanted) -> None:
    """Torch finds the schema and the fake tensors of the backward in order, whichever gradients are wanted."""
    library, inputs = operators_of(package), draw(device, steps=2)
    forward = _forward_arguments(inputs, True)
    with torch.no_grad():
        checkpoints = library.FORWARD(*forward)[2]
    operands = [x if x is None else x.detach() for x in forward[:7]]
    flags = [bool(want) for want in wanted]
    call = (inputs.dy, inputs.dstate, *operands, checkpoints, None, 1.0, flags, False)
    torch.library.opcheck(library.BACKWARD, call)


@pytest.mark.parametrize("variant", [PLAIN, GATED], ids=["given", "softplus"])
def test_opcheck_of_the_step(package, device, variant) -> None:
    """The schema's word that the state, and nothing else, is written holds."""
    inputs = draw(device, batch=2, steps=1, variant=variant)
    token = [x[:, 0] for x in (inputs.q, inputs.k, inputs.v)]
    call = (*token, inputs.weight, inputs.forget[:, 0], inputs.A_log, inputs.dt_bias, inputs.initial_state.clone())
    torch.library.opcheck(operators_of(package).STEP, call)


@pytest.fixture
def mixer(package, device) -> tuple[Mixer, Tensor]:
    """Return a layer and its input."""
    torch.manual_seed(0)
    return Mixer(package.m2rnn).to(device), torch.randn(2, 3, 8).to(device)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_copies_of_a_module(mixer, copied) -> None:
    """A module that holds the operator can be copied and pickled, and the copy has parameters of its own."""
    module, x = mixer
    other = copied(module)
    assert other.m2rnn is module.m2rnn
    assert_same(trained(other, x), trained(module, x))
    with torch.no_grad():
        other.weight.mul_(0.5)
    assert not torch.equal(other(x), module(x))


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_copies_of_the_generated_layer(package, device, copied) -> None:
    """``M2RNN``, after a call, is copied and pickled with its dims, and the copy has parameters of its own."""
    layer, x = make_layer(package).to(device), tokens(device, 2, 3)
    expected = with_gradients(layer, x)
    other = copied(layer)
    assert type(other) is package.M2RNN
    assert repr(other) == repr(layer)
    assert_same(with_gradients(other, x), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert_same(with_gradients(layer, x), expected)
    assert not torch.equal(other(x), expected["y"])


ELSEWHERE = """
import pickle, sys, torch
torch.set_num_threads(1)
with open("layer.pickle", "rb") as stream:
    layer, x = pickle.load(stream)
assert "m2gen" not in sys.modules
torch.save(layer(x).detach(), "y.pt")
"""
"""Code of a process that loads a pickle, finds its package, and cannot import m2gen."""


def test_a_pickled_layer_in_another_process(tmp_path, device) -> None:
    """It needs the package on the path, gives the same bits, and does not import m2gen."""
    package = import_package(tmp_path / "pickled", build_package("pickled", [PLAIN], make_schedule()), "pickled")
    layer, x = make_layer(package).to(device), tokens(device, 2, 3)
    with torch.no_grad():
        expected = layer(x)
    (tmp_path / "layer.pickle").write_bytes(pickle.dumps((layer, x)))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt"), expected)


def test_functional_call(mixer) -> None:
    """Parameters may come from outside, and gradients go there."""
    module, x = mixer
    parameters = {name: (p.detach() * 0.5).requires_grad_() for name, p in module.named_parameters()}
    y = torch.func.functional_call(module, parameters, (x,))
    gradients = torch.autograd.grad(y.square().sum(), list(parameters.values()))
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(parameters[name])
    assert_same(trained(module, x), {"y": y.detach(), **dict(zip(parameters, gradients, strict=True))})


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(mixer, reentrant) -> None:
    """A recomputed forward gives the same bits."""
    module, x = mixer
    expected = trained(module, x)
    leaf = x.detach().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(module, leaf, use_reentrant=reentrant)
    y.square().sum().backward()
    given = {name: p.grad for name, p in module.named_parameters()}
    assert_same({"y": y.detach(), **given}, expected)


def test_inference_mode(package, operands) -> None:
    """Inference tensors go in and come out, with the bits of a call outside."""
    expected, last = package.m2rnn(**operands)
    with torch.inference_mode():
        y, state = package.m2rnn(**{name: x.clone() for name, x in operands.items()})
        token = {name: operands[name][:, 0].clone() for name in ("q", "k", "v", "forget")}
        package.m2rnn_step(**token, weight=operands["weight"], state=state.clone())
    assert y.is_inference()
    assert torch.equal(y, expected)
    assert torch.equal(state, last)


def test_packed_in_inference_mode(package, device) -> None:
    """Offsets without a version counter are read, and checked, at each call."""
    with torch.inference_mode():
        inputs = packed(draw(device, 2, 2))
        package.m2rnn(inputs.q, inputs.k, inputs.v, inputs.weight, inputs.forget, cu_seqlens=inputs.cu_seqlens)
        inputs.cu_seqlens[1] = 9
        with pytest.raises(ValueError, match="not decrease"):
            package.m2rnn(inputs.q, inputs.k, inputs.v, inputs.weight, inputs.forget, cu_seqlens=inputs.cu_seqlens)


@pytest.mark.parametrize("name", ["q", "weight", "forget", "initial_state"])
def test_a_second_derivative_is_refused(package, operands, name) -> None:
    """Differentiating a gradient raises, rather than giving something else than the second derivative."""
    leaf = operands[name].detach().requires_grad_()
    y, _ = package.m2rnn(**{**operands, name: leaf})
    (gradient,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum(), leaf)


def test_no_second_derivative_through_dy_either(package, operands) -> None:
    """The gradient is not a constant of dy: differentiating by that raises too."""
    leaf = operands["q"].detach().requires_grad_()
    y, _ = package.m2rnn(**{**operands, "q": leaf})
    dy = torch.ones_like(y).requires_grad_()
    (gradient,) = torch.autograd.grad(y, leaf, dy, create_graph=True)
    assert gradient.shape[1] == STEPS
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum(), dy)


def test_changed_operands_are_noticed(package, device) -> None:
    """An operand overwritten between forward and backward makes the backward fail, not lie."""
    inputs = changed(draw(device), ("q",), lambda x: x.detach().requires_grad_())
    k = inputs.k.clone()
    y, _ = package.m2rnn(inputs.q, k, inputs.v, inputs.weight, inputs.forget)
    k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
