"""Whoever watches or stands in for a call: meta and fake tensors, tracers, exporters, counters of flops, modes."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import Spy, arguments, assert_same, operators_of, packed
from layer import Mixer
from support import GATED_HEADS, make_variant
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from m2gen.problem import Inputs, Problem, make_inputs

PLAIN, GATED = make_variant(), make_variant(heads=GATED_HEADS, gate="softplus")
KINDS = {"given": PLAIN, "softplus": GATED}


@pytest.fixture
def package(modules) -> ModuleType:
    """Return a package whose sums do not depend on the order of programs."""
    return modules("two_level_partial", "carry")


def draw(device: torch.device | str, variant=PLAIN, batch: int = 2, steps: int = 3) -> Inputs:
    """Return operands of a few sequences."""
    return make_inputs(variant, Problem(batch, steps, initial_state=True), seed=batch + steps).to(torch.device(device))


def token_of(inputs: Inputs) -> dict[str, Tensor]:
    """Return the operands of the first step, with a state."""
    names = ("q", "k", "v", "weight", "forget", "A_log", "dt_bias")
    named = {name: x[:, 0] if name in ("q", "k", "v", "forget") else x for name, x in arguments(inputs, names).items()}
    return {**named, "state": inputs.initial_state.clone()}


def facts(*tensors: Tensor) -> list[tuple[torch.Size, torch.dtype]]:
    """Return the facts of a tensor without memory."""
    return [(x.shape, x.dtype) for x in tensors]


def shapes_of(package: ModuleType, inputs: Inputs, **options: Any) -> list[Any]:
    """Return shapes and dtypes of results and gradients."""
    leaves = {name: x if name == "cu_seqlens" else x.detach().requires_grad_() for name, x in arguments(inputs).items()}
    y, state = package.m2rnn(**leaves, **options)
    wanted = [x for x in leaves.values() if x.requires_grad]
    gradients = torch.autograd.grad([y, state], wanted, [torch.ones_like(y), torch.ones_like(state)])
    assert {x.device for x in (y, state, *gradients)} == {inputs.q.device}
    return facts(y, state, *gradients)


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("together", [False, True], ids=["padded", "packed"])
def test_meta_tensors(package, device, backend, kind, together) -> None:
    """Results and gradients have the shapes and dtypes that they have on a device, and nothing runs."""
    real = draw(device, KINDS[kind])
    real = packed(real) if together else real
    given = shapes_of(package, real.to(torch.device("meta")), backend=backend)
    assert given == shapes_of(package, real, backend=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_meta_tensors(package, device, kind) -> None:
    """A step gives shapes, and the state that it was given."""
    call = token_of(draw("meta", KINDS[kind]))
    y, state = package.m2rnn_step(**call)
    assert state is call["state"]
    assert facts(y) == facts(package.m2rnn_step(**token_of(draw(device, KINDS[kind])))[0])
    assert y.is_meta


def test_the_drop_in_on_meta_tensors(package) -> None:
    """The published arguments do as well."""
    compat = importlib.import_module(f"{package.__name__}.compat")
    inputs = draw("meta")
    operands = (inputs.q, inputs.k, inputs.v, inputs.weight, inputs.forget, inputs.initial_state)
    assert facts(*compat.m2rnn(*operands)) == facts(inputs.dy, inputs.initial_state)


def test_wrong_meta_tensors_are_refused(package) -> None:
    """The checks are those of tensors with memory, each time."""
    inputs = draw("meta")
    call = arguments(inputs, ("q", "k", "v", "weight", "forget"))
    for _ in range(2):
        with pytest.raises(ValueError, match="k must begin with"):
            package.m2rnn(**{**call, "k": inputs.k[:, 1:]})
    unbuilt = make_inputs(make_variant(8, 8, (1, 1, 3, 3, 3)), Problem(1, 1), seed=0).to(torch.device("meta"))
    with pytest.raises(package.VariantNotBuiltError):
        package.m2rnn(**arguments(unbuilt))


@pytest.mark.parametrize("kind", ["cpu", "cuda", "meta"])
def test_fake_tensors_of_devices_that_are_not_there(package, monkeypatch, kind) -> None:
    """A fake tensor may claim a GPU that no machine has, or a CPU where nothing runs; checkpoints have a shape, too."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    dispatch = operators_of(package).launches.dispatch
    spy = Spy(package, monkeypatch)
    with FakeTensorMode():
        call = {name: torch.empty(x.shape, device=kind) for name, x in arguments(draw("cpu")).items()}
        y, state = package.m2rnn(**call)
        saved = operators_of(package).FORWARD(
            *(call[name] for name in ("q", "k", "v", "weight", "forget")), None, None, call["initial_state"],
            None, None, 1.0, True, False,
        )[2]  # fmt: skip
        token = [torch.empty(x.shape, device=kind) for x in token_of(draw("cpu")).values()]
        stepped = operators_of(package).STEP(*token[:5], None, None, token[5])
    assert {x.device.type for x in (y, state, saved, stepped)} == {kind}
    assert (y.shape, state.shape, stepped.shape) == ((2, 3, 2, 16), (2, 2, 16, 16), (2, 2, 16))
    assert saved.shape == (2, 2, 16, 16)
    assert spy.launched == []
    assert dispatch.present(torch.device("cuda", 3)).type == "meta"


def test_a_kind_of_device_without_kernels(package) -> None:
    """An error names the device, and not a property that it lacks."""
    with pytest.raises(RuntimeError, match=r"^m2rnn: kernels run on GPUs of NVIDIA and AMD, got tensors on mps$"):
        operators_of(package).launches.dispatch.device_of(torch.device("mps"))


@pytest.fixture
def _quiet():
    """Leave out that a trace takes head counts for constants, which they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("_quiet")
def test_a_traced_call(package, device) -> None:
    """``torch.jit.trace`` under no_grad records the operator, which then runs on other numbers and lengths."""

    def call(q, k, v, weight, forget):
        return package.m2rnn(q, k, v, weight, forget)

    names = ("q", "k", "v", "weight", "forget")
    with torch.no_grad():
        traced = torch.jit.trace(call, tuple(getattr(draw(device), name) for name in names))
        assert f"{operators_of(package).NAMESPACE}::forward" in str(traced.graph)
        for batch, steps in ((2, 3), (1, 2)):
            inputs = draw(device, batch=batch, steps=steps)
            other = [getattr(inputs, name) for name in names]
            assert_same(*(dict(zip(("y", "state"), f(*other), strict=True)) for f in (traced, call)))


@pytest.mark.usefixtures("_quiet")
def test_a_traced_step(package, device) -> None:
    """A traced step writes the state of each call."""

    def step(q, k, v, weight, forget, state):
        return package.m2rnn_step(q, k, v, weight, forget, state)[0]

    with torch.no_grad():
        traced = torch.jit.trace(step, tuple(token_of(draw(device)).values()))
        one, other = (tuple(token_of(draw(device, batch=1)).values()) for _ in range(2))
        assert torch.equal(traced(*one), step(*other))
        assert torch.equal(one[-1], other[-1])


def test_exported_modules(package, device) -> None:
    """``torch.export`` holds the operator, for training and with a number of sequences that is not fixed."""
    torch.manual_seed(0)
    module, x = Mixer(package.m2rnn).to(device), torch.randn(3, 3, 8).to(device)
    sizes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(module, (x,), dynamic_shapes=sizes)
    assert any(node.target is operators_of(package).FORWARD for node in exported.graph.nodes)
    for batch in (3, 2):
        assert torch.equal(exported.module()(x[:batch]), module(x[:batch]))


STEPS, ROWS, COLS, HEADS = 3, 16, 16, 2
ONE_PRODUCT = 2 * 2 * STEPS * HEADS * ROWS * COLS
"""Multiplications and additions of one product of a vector and a state, of two sequences of STEPS steps."""


def counted(package: ModuleType, run: Any) -> dict[str, int]:
    """Return torch's count of flops for each operator of a package."""
    with FlopCounterMode(display=False) as counter:
        run()
    prefix = f"{operators_of(package).NAMESPACE}."
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    return {name.removeprefix(prefix): count for name, count in counts.items() if name.startswith(prefix)}


@pytest.mark.parametrize("on", ["device", "meta"])
def test_flops_of_forward_and_backward(package, device, on) -> None:
    """Both passes count what their products take: 18 of one product forward (16 columns of H W, k v^T, H^T q)."""
    inputs = draw(device if on == "device" else "meta")
    leaves = {name: x.detach().requires_grad_() for name, x in arguments(inputs).items()}

    def run() -> None:
        y, _ = package.m2rnn(**leaves)
        y.backward(torch.ones_like(y))

    forward = (COLS + 2) * ONE_PRODUCT
    # states again, H dy, q dy^T, D W^T, D v, D^T k, H^T D
    backward = (COLS + 1 + 1 + 1 + COLS + 1 + 1 + COLS) * ONE_PRODUCT
    assert counted(package, run) == {"forward": forward, "backward": backward}


def test_flops_of_what_is_wanted(package, device) -> None:
    """A gradient of q alone takes the states and H dy; calls without gradients and steps are counted as well."""
    inputs = draw(device)
    leaf = inputs.q.detach().requires_grad_()

    def run() -> None:
        package.m2rnn(leaf, inputs.k, inputs.v, inputs.weight, inputs.forget)[0].sum().backward()

    backward = (COLS + 2) * ONE_PRODUCT
    assert counted(package, run)["backward"] == backward
    assert counted(package, lambda: package.m2rnn(**arguments(inputs))) == {"forward": (COLS + 2) * ONE_PRODUCT}
    assert counted(package, lambda: package.m2rnn(**arguments(packed(inputs)))) == {"forward": (COLS + 2) * ONE_PRODUCT}
    step = counted(package, lambda: package.m2rnn_step(**token_of(inputs)))
    assert step == {"step": (COLS + 2) * ONE_PRODUCT // STEPS}


class Noting(TorchFunctionMode):
    """A mode of torch functions that keeps the names of what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_of_torch_functions_see_the_operator(package, device) -> None:
    """A call without gradients is not hidden from them."""
    with Noting() as mode:
        package.m2rnn(**arguments(draw(device)))
    assert f"{operators_of(package).NAMESPACE}.forward.default" in mode.seen
