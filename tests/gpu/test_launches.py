"""Calls never wait for the GPU, run on the right device, and launch nothing if they are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from calls import DIFFERENTIABLE, Results, Spy, arguments, assert_same, changed, differentiate, operators_of, packed
from support import OPERANDS, make_variant

from m2gen.problem import Inputs, Problem, make_inputs

pytestmark = pytest.mark.gpu

VARIANT = make_variant(heads=(1, 1, 4, 2, 4), dtype="bf16")


def draw(device: torch.device) -> Inputs:
    """Return operands of two sequences."""
    return make_inputs(VARIANT, Problem(2, 37, initial_state=True), 0).to(device)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make whatever waits for the GPU an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_warm_call_never_waits(built, device, deterministic) -> None:
    """Neither forward nor backward of a call that was compiled before waits for the GPU."""
    operator, inputs = built(VARIANT).m2rnn, draw(device)
    differentiate(operator, inputs, deterministic=deterministic)
    with no_waiting():
        differentiate(operator, inputs, deterministic=deterministic)


def test_known_offsets_are_not_read_again(built, device) -> None:
    """A packed call waits for new offsets once; forward and backward with offsets that passed never do."""
    operator, inputs = built(VARIANT).m2rnn, packed(draw(device))
    differentiate(operator, inputs)
    given = {name: x.detach() for name, x in arguments(inputs).items()}
    leaves = [given[name].requires_grad_() for name in DIFFERENTIABLE if name in given]
    operator(**given)
    with no_waiting():
        y, state = operator(**given)
        torch.autograd.grad([y, state], leaves, [inputs.dy, inputs.dstate])


def test_a_warm_step_never_waits(built, device) -> None:
    """Decoding runs ahead of the GPU."""
    package, inputs = built(VARIANT), draw(device)
    token = {name: getattr(inputs, name)[:, 0] for name in ("q", "k", "v", "forget")}
    state = inputs.initial_state.clone()
    package.m2rnn_step(**token, weight=inputs.weight, state=state)
    with no_waiting():
        package.m2rnn_step(**token, weight=inputs.weight, state=state)


@pytest.mark.parametrize("name", OPERANDS[1:])
def test_an_operand_left_on_the_cpu(built, device, monkeypatch, name) -> None:
    """One line names the operand and both devices, and nothing reaches the GPU."""
    package = built(VARIANT)
    inputs = changed(draw(device), (name,), lambda x: x.cpu())
    spy = Spy(package, monkeypatch)
    with pytest.raises(ValueError, match=rf"^m2rnn: {name} must be on cuda:\d+ as q is, got cpu$"):
        package.m2rnn(**arguments(inputs))
    assert spy.launched == []
    torch.cuda.synchronize()


def test_offsets_left_on_the_cpu(built, device) -> None:
    """Offsets must be where the kernel reads them."""
    inputs = changed(packed(draw(device)), ("cu_seqlens",), lambda x: x.cpu())
    with pytest.raises(ValueError, match=r"^m2rnn: cu_seqlens must be on cuda:\d+ as q is, got cpu$"):
        built(VARIANT).m2rnn(**arguments(inputs))


def test_cpu_tensors_beside_a_gpu(built, monkeypatch) -> None:
    """Operands that are all on the CPU are refused, rather than read by the GPU as if they were its own."""
    package = built(VARIANT)
    spy = Spy(package, monkeypatch)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        package.m2rnn(**arguments(draw(torch.device("cpu"))))
    assert spy.launched == []


@pytest.mark.parametrize("offsets", [[0, 80, 74], [1, 37, 74], [0, 37, 75], [0, 37, 2**31 - 1]])
def test_offsets_that_lie_never_reach_the_gpu(built, device, monkeypatch, offsets) -> None:
    """Offsets are read before anything is launched that would follow them."""
    package = built(VARIANT)
    inputs = changed(packed(draw(device)), ("cu_seqlens",), lambda x: torch.tensor(offsets, dtype=x.dtype).to(x.device))
    spy = Spy(package, monkeypatch)
    with pytest.raises(ValueError, match=r"^m2rnn: cu_seqlens must "):
        package.m2rnn(**arguments(inputs))
    assert spy.launched == []
    torch.cuda.synchronize()


@pytest.fixture
def two_gpus() -> tuple[torch.device, torch.device]:
    """Return two GPUs, the first of which is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "packed"])
def test_a_device_that_is_not_current(built, two_gpus, flat) -> None:
    """Tensors on the second GPU are served there while the first is current, and the first stays current."""
    operator = built(VARIANT).m2rnn
    results = []
    for device in two_gpus:
        inputs = draw(device)
        results.append(differentiate(operator, packed(inputs) if flat else inputs, deterministic=True))
        assert torch.cuda.current_device() == 0
    assert_same_on_both(results)


def assert_same_on_both(results: list[Results]) -> None:
    """Fail unless the second GPU holds the second results, and they have the bits of the first."""
    assert all(x.device.index == 1 for x in results[1].values())
    assert_same({name: x.to("cuda:0") for name, x in results[1].items()}, results[0])


def _inferred(package: ModuleType, inputs: Inputs) -> Results:
    y, state = package.m2rnn(**arguments(inputs), deterministic=True)
    return {"y": y, "state": state}


def _stepped(package: ModuleType, inputs: Inputs) -> Results:
    token = {name: getattr(inputs, name)[:, 0] for name in ("q", "k", "v", "forget")}
    y, state = package.m2rnn_step(**token, weight=inputs.weight, state=inputs.initial_state.clone())
    return {"y": y, "state": state}


CALLS = {
    "padded": _inferred,
    "packed": lambda package, inputs: _inferred(package, packed(inputs)),
    "step": _stepped,
}
"""Calls that need no gradient: from the second of a kind on, their launches are remembered."""


@pytest.mark.parametrize("kind", CALLS)
def test_a_remembered_launch_on_a_device_that_is_not_current(built, two_gpus, monkeypatch, kind) -> None:
    """The second call of a kind runs where its tensors are, by the launch of the first, and gives the same bits."""
    package, call = built(VARIANT), CALLS[kind]
    every = [draw(device) for device in two_gpus]
    first = [call(package, inputs) for inputs in every]
    keeping = operators_of(package).launches.launchers.relaunch
    monkeypatch.setattr(keeping, "keep", lambda *_: pytest.fail("must not be looked up again"))
    again = [call(package, inputs) for inputs in every]
    assert torch.cuda.current_device() == 0
    assert_same_on_both(again)
    for one, other in zip(again, first, strict=True):
        assert_same(one, other)
