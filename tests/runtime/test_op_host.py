"""Calls without gradients skip torch's dispatcher, and look each launch up once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from calls import Spy, arguments, assert_same, module_of, operators_of
from support import build_package, import_package, make_schedule, make_variant
from torch._subclasses.fake_tensor import FakeTensorMode

from m2gen.problem import Problem, make_inputs


class FakeKernel:
    """A kernel as Triton's: compiled by a call with a grid, then launched by what that returned, or its launcher."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, *, compiles: bool = True) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.compiles = compiles

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(*values: Any, **options: Any) -> Any:
            self.log.append(("compiled", grid, values, options))
            return self if self.compiles else None

        def again(*values: Any, stream: int) -> None:
            self.log.append(("launched", grid, values, stream))

        return again if self.log else first

    def run(self, *values: Any) -> None:
        self.log.append(("run", *values))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the kernels' module of a package."""
    package = build_package("hosted", [make_variant()], make_schedule("atomic"))
    imported = import_package(tmp_path_factory.mktemp("hosted") / "hosted", package)
    return operators_of(imported).launches.dispatch.KERNELS


def _module(kernels: Any) -> Any:
    """Return the only module of kernels, however the table is laid out."""
    while isinstance(kernels, dict | tuple | list):
        kernels = next(iter(kernels.values() if isinstance(kernels, dict) else kernels))
    return kernels


def test_a_launch_is_looked_up_once(kernels, monkeypatch) -> None:
    """The first launch compiles; what is kept hands the same binary other addresses, then scalars and flags.

    It launches on the stream that is current at the time, not on the one that was.
    """
    kernel, known, first, other = FakeKernel(), {}, torch.zeros(1), torch.zeros(1)
    streams = iter((7, 8))
    monkeypatch.setattr(_module(kernels), "current_stream_of", lambda: lambda device: (device, next(streams)))
    _module(kernels).launch(known, "key", kernel, 5, (first, None), (1, 2), {"SAVE": False, "ATOMIC": True})
    ((_, grid, values, options),) = kernel.log
    assert (grid, values) == ((5, 1, 1), (first, None, 1, 2))
    assert options.items() >= {"SAVE": False, "ATOMIC": True, "num_stages": 1}.items()
    known["key"]((other, None))
    known["key"]((first, None))
    binary, hooks, rest = ("function", "metadata"), (None, None, None), (None, 1, 2, False, True)
    assert kernel.log[1:] == [
        ("run", 5, 1, 1, (-1, 7), *binary, *hooks, other.data_ptr(), *rest),
        ("run", 5, 1, 1, (-1, 8), *binary, *hooks, first.data_ptr(), *rest),
    ]


def test_hooks_see_known_launches(kernels, monkeypatch) -> None:
    """A profiler that hooks Triton's launches, even after the first, sees those that are looked up no more."""
    kernel, known, x = FakeKernel(), {}, torch.zeros(1)
    monkeypatch.setattr(_module(kernels), "current_stream_of", lambda: lambda device: device)
    _module(kernels).launch(known, "key", kernel, 5, (x,), (), {"SAVE": True})
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    known["key"]((x,))
    assert kernel.log[1] == ("launched", (5, 1, 1), (x.data_ptr(), True), -1)


@pytest.mark.parametrize("compiles", [False, True])
def test_nothing_is_kept(kernels, compiles) -> None:
    """The interpreter has nothing to keep, and a binary that nobody will launch again is not even loaded."""
    known = None if compiles else {}
    kernel = FakeKernel(compiles=compiles)
    _module(kernels).launch(known, "key", kernel, 1, (), (), {})
    assert not known
    assert len(kernel.log) == 1


@pytest.mark.parametrize("deterministic", [False, True])
def test_launchers_use_what_is_known(package, operands, monkeypatch, deterministic) -> None:
    """A launch that is kept for the same flags is used, with this call's pointers."""
    module = _module(operators_of(package).launches.dispatch.KERNELS)
    every = dict.fromkeys(("A_log", "dt_bias", "initial_state", "cu_seqlens")) | operands
    order = ("q", "k", "v", "weight", "forget", "A_log", "dt_bias", "initial_state", "cu_seqlens")
    seen: list[Any] = []
    known = {(False, deterministic): seen.append}
    monkeypatch.setattr(module, "launch", lambda *_: pytest.fail("must not be looked up again"))
    y, state, checkpoints = module.forward(*(every[name] for name in order), False, deterministic, known)
    ((q, *_),) = seen
    assert q is operands["q"]
    assert checkpoints is None
    assert any(x is state for x in seen[0])
    assert y.dtype is operands["v"].dtype


def _facts(package: Any, operands: dict[str, Any]) -> Any:
    every = dict.fromkeys(("A_log", "dt_bias", "initial_state", "cu_seqlens")) | operands
    return module_of(package, "checks").check("m2rnn", ("B", "S"), every)


def test_calls_alike_share_what_is_known(package, operands) -> None:
    """Another tensor of the same layout is the same kind of call."""
    assert _facts(package, operands) is _facts(package, {k: x.clone() for k, x in operands.items()})


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
