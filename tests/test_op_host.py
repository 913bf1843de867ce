"""What a call does on the host when nothing is to be differentiated: no dispatcher, and each launch looked up once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import Spy, arguments, assert_same, module_of
from support import build_package, import_package, make_schedule, make_variant
from torch._subclasses.fake_tensor import FakeTensorMode

from m2gen.problem import Problem, make_inputs


class FakeKernel:
    """A kernel as Triton's: compiled by a call with a grid, then launched by what that returned."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_launch(*values: Any, **options: Any) -> Any:
            self.log.append(("compiled", grid, values, options))
            return self

        def launch(*values: Any) -> None:
            self.log.append(("launched", grid, values))

        return launch if any(entry[0] == "compiled" for entry in self.log) else compile_and_launch


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the kernels' module of a package."""
    package = build_package("hosted", [make_variant()], make_schedule("atomic"))
    imported = import_package(tmp_path_factory.mktemp("hosted") / "hosted", package)
    return module_of(imported, "dispatch").KERNELS


def _module(kernels: Any) -> Any:
    """Return the only module of kernels, however the table is laid out."""
    while isinstance(kernels, dict | tuple | list):
        kernels = next(iter(kernels.values() if isinstance(kernels, dict) else kernels))
    return kernels


def test_a_launch_is_looked_up_once(kernels) -> None:
    """The first launch compiles; later ones of the same flags hand the binary arguments and flags in order."""
    kernel, known = FakeKernel(), {}
    for values in ((1, 2), (3, 4)):
        _module(kernels).launch(known, kernel, 5, values, {"SAVE": False, "ATOMIC": True})
    (compiled, launched) = kernel.log
    assert compiled[:3] == ("compiled", (5, 1, 1), (1, 2))
    assert compiled[3].items() >= {"SAVE": False, "ATOMIC": True, "num_stages": 1}.items()
    assert launched == ("launched", (5, 1, 1), (3, 4, False, True))


def test_other_flags_are_another_launch(kernels) -> None:
    """What was compiled for one value of a flag never serves another."""
    known: dict[Any, Any] = {}
    for flag in (False, True):
        kernel = FakeKernel()
        _module(kernels).launch(known, kernel, 1, (), {"ATOMIC": flag})
        assert kernel.log[0][0] == "compiled"


def test_nothing_is_kept_without_a_place(kernels) -> None:
    """Calls that go through torch's dispatcher leave the look-up to Triton."""
    for _ in range(2):
        kernel = FakeKernel()
        _module(kernels).launch(None, kernel, 1, (), {})
        assert [entry[0] for entry in kernel.log] == ["compiled"]


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
