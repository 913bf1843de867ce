"""Calls without gradients skip torch's dispatcher, and look each launch up once."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from calls import Spy, arguments, assert_same, module_of, operators_of
from gluon_on_cpu import OPTIONS
from support import make_variant
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from m2gen.problem import Problem, make_inputs
from m2gen.runtime import relaunch
from m2gen.runtime.relaunch import Launched


class FakeBinary:
    """What a kernel's call returns as Triton's does: launched by what a grid gives, or its own launcher."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def again(*values: Any, stream: int) -> None:
            self.log.append(("launched", grid, values, stream))

        return again

    def run(self, *values: Any) -> None:
        self.log.append(("run", *values))


@dataclass
class FakeKernel:
    """A kernel that notes with what it was compiled."""

    binary: FakeBinary | None
    log: list[tuple[Any, ...]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(*values: Any, **constants: Any) -> Any:
            self.log.append((grid, values, constants))
            return self.binary

        return first


def test_a_launch_is_looked_up_once(monkeypatch) -> None:
    """What is kept hands the same binary other addresses, then scalars and flags.

    It launches on the stream that is current at the time, not on the one that was.
    """
    binary, known, first, other = FakeBinary(), {}, torch.zeros(1), torch.zeros(1)
    streams = iter((7, 8))
    monkeypatch.setattr(relaunch, "current_stream_of", lambda: lambda device: (device, next(streams)))
    relaunch.keep(known, "key", Launched(binary, 5, (1, 2, False, True), -1), "call")
    assert known["key"].call == "call"
    assert binary.log == []
    known["key"].launch((other, None))
    known["key"].launch((first, None))
    found, hooks, rest = ("function", "metadata"), (None, None, None), (None, 1, 2, False, True)
    assert binary.log == [
        ("run", 5, 1, 1, (-1, 7), *found, *hooks, other.data_ptr(), *rest),
        ("run", 5, 1, 1, (-1, 8), *found, *hooks, first.data_ptr(), *rest),
    ]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_known_launches(hook, monkeypatch) -> None:
    """A profiler that hooks Triton's launches, even after the first, sees those that are looked up no more."""
    binary, known, x = FakeBinary(), {}, torch.zeros(1)
    monkeypatch.setattr(relaunch, "current_stream_of", lambda: lambda device: device)
    relaunch.keep(known, "key", Launched(binary, 5, (True,), -1))
    monkeypatch.setattr(getattr(triton.knobs.runtime, hook), "calls", [print])
    known["key"].launch((x,))
    assert binary.log == [("launched", (5, 1, 1), (x.data_ptr(), True), -1)]


@pytest.fixture
def call(package: ModuleType, operands: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what calls the forward's launcher, or the step's with a state, of kernels that are fakes."""
    given = tuple(operands.get(name) for name in ("q", "k", "v", "weight", "forget", "A_log", "dt_bias"))
    launches = operators_of(package).launches
    launchers, kernels = launches.launchers, launches.dispatch.kernels_for(*given[:6], None)
    monkeypatch.setattr(launchers.relaunch, "current_stream_of", lambda: lambda device: device)

    def launch(kernel: FakeKernel, *arguments: Any) -> Any:
        for name in ("forward", "step", "sum"):
            monkeypatch.setattr(kernels, f"m2rnn_{name}_kernel", kernel, raising=False)
        if len(arguments) > 1:
            return launchers.forward(kernels, given, None, None, False, *arguments)
        tokens = tuple(x if i == 3 or x is None else x[:, 0] for i, x in enumerate(given))
        state = torch.zeros(len(given[0]), *launchers.launch_plan.plan_of(kernels).state)
        return launchers.step(kernels, tokens, state, *arguments)

    return launch


@pytest.mark.parametrize("compiles", [False, True])
def test_nothing_is_kept(call, compiles) -> None:
    """The interpreter has nothing to keep, and a binary that nobody will launch again is not even loaded."""
    known = None if compiles else {}
    kernel = FakeKernel(FakeBinary() if compiles else None)
    call(kernel, True, known)
    call(kernel, known)
    assert not known
    assert len(kernel.log) >= 2
    assert kernel.binary is None or not kernel.binary.log


@pytest.mark.parametrize("mode", [(False,), (True,), ()], ids=["forward", "deterministic", "step"])
def test_launchers_use_what_is_known(call, mode) -> None:
    """A second call compiles nothing, has results of the same shapes and dtypes, and hands over its own pointers.

    Scalars, and constants without options, follow the pointers in the order of the first call.
    """
    kernel, known = FakeKernel(FakeBinary()), {}
    first, second = (call(kernel, *mode, known) for _ in range(2))
    assert len(kernel.log) == len(kernel.binary.log) == len(known) >= 1
    for (grid, values, constants), (_, *launched) in zip(kernel.log, kernel.binary.log, strict=True):
        flags = [x for name, x in constants.items() if name not in OPTIONS]
        scalars = [x for x in values if type(x) is int]
        assert tuple(launched[:3]) == grid
        assert launched[9 + len(values) - len(scalars) :] == [*scalars, *flags]
    every = [(found,) if isinstance(found, Tensor) else found for found in (first, second)]
    assert [(x.shape, x.dtype) for x in every[0] if x is not None] == [
        (x.shape, x.dtype) for x in every[1] if x is not None
    ]
    written = [x.data_ptr() for x in every[1] if x is not None]
    handed = {x for _, *launched in kernel.binary.log for x in launched[9:]}
    assert handed >= set(written)


def _facts(package: Any, operands: dict[str, Any]) -> Any:
    every = dict.fromkeys(("A_log", "dt_bias", "initial_state", "cu_seqlens")) | operands
    return module_of(package, "checks").check("m2rnn", ("B", "S"), every)


def test_calls_alike_share_what_is_known(package, operands) -> None:
    """Another tensor of the same layout is the same kind of call."""
    assert _facts(package, operands) is _facts(package, {k: x.clone() for k, x in operands.items()})


def test_what_is_known_of_calls_is_bounded(package, operands, monkeypatch) -> None:
    """Calls of ever other shapes do not fill the memory, and those of the last shape are known."""
    checks = module_of(package, "checks")
    monkeypatch.setattr(checks, "_MOST_PASSED", 2)
    monkeypatch.setattr(checks, "_PASSED", {})
    sizes = []
    for steps in (1, 2, 3, 4):
        cut = {name: x[:, :steps] if name in ("q", "k", "v", "forget") else x for name, x in operands.items()}
        assert _facts(package, cut) is _facts(package, cut)
        sizes.append(len(checks._PASSED))
    assert sizes == [1, 2, 1, 2]


@pytest.mark.parametrize("change", ["strides", "alignment", "shape", "absence"])
def test_calls_that_a_binary_may_not_serve_are_told_apart(package, operands, change) -> None:
    """Triton compiles for strides and alignment, too."""
    q = operands["q"]
    pad = torch.empty(q.numel() + 1, dtype=q.dtype, device=q.device)[1:].view(q.shape)
    changed = {
        "strides": {"q": torch.stack([q, q], -1)[..., 0]},
        "alignment": {"q": pad.copy_(q)},
        "shape": {name: x[:, :2] for name, x in operands.items() if name in ("q", "k", "v", "forget")},
        "absence": {"initial_state": None},
    }[change]
    assert _facts(package, operands | changed) is not _facts(package, operands)


def test_with_and_without_the_dispatcher(package, operands, monkeypatch) -> None:
    """A profiler is told of the operator; the results are the same bits."""
    spy = Spy(package, monkeypatch)
    alone = package.m2rnn(**operands)
    assert spy.names == []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        watched = package.m2rnn(**operands)
    assert spy.names == ["FORWARD"]
    name = f"{module_of(package, 'library').NAMESPACE}::forward"
    assert name in {event.name for event in profile.events()}
    assert_same(dict(zip("ys", alone, strict=True)), dict(zip("ys", watched, strict=True)))


def test_fake_tensors_run_no_kernel(package, device, monkeypatch) -> None:
    """Under a fake-tensor mode a call gives shapes and dtypes, and launches nothing."""
    inputs = make_inputs(make_variant(), Problem(2, 3), seed=0).to(device)
    spy = Spy(package, monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(x) for name, x in arguments(inputs).items() if x is not None}
        y, state = package.m2rnn(**fakes)
    assert spy.launched == []
    assert y.shape == inputs.dy.shape
    assert state.dtype is torch.float32


def test_numbers_that_memory_holds_negated(package, operands, monkeypatch) -> None:
    """The imaginary part of a conjugate is a view with a flag, which torch's dispatcher resolves before a kernel."""
    spy = Spy(package, monkeypatch)
    q = torch.complex(torch.zeros_like(operands["q"]), -operands["q"]).conj().imag
    assert q.is_neg()
    assert torch.equal(q, operands["q"])
    y, state = package.m2rnn(**operands | {"q": q})
    assert spy.names == ["FORWARD"]
    assert_same({"y": y, "state": state}, dict(zip(("y", "state"), package.m2rnn(**operands), strict=True)))
