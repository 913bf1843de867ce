"""A package with kernels by bucket: which serve a call, forward and backward, and what a compiler sees of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import assert_close, differentiate, operators_of, packed
from support import SCHEDULES, import_package, make_variant
from torch import Tensor

from m2gen.bucket import BUCKETS, Bucket, most_sequences
from m2gen.db.choice import module_name
from m2gen.device import PORTABLE
from m2gen.package import emit
from m2gen.problem import Inputs, Problem, make_inputs
from m2gen.runtime.launch_plan import plan_of
from m2gen.runtime.launchers import sizes
from m2gen.schedule import Schedule
from m2gen.variant import BuiltVariant
from m2gen.verify.oracle import eager, own_arithmetic

EPS = torch.finfo(torch.float32).eps
HEADS, SMS = 2, 12
"""Sizes at which few sequences reach another bucket, so that the interpreter need not run many."""
VARIANT = make_variant(heads=(1, 1, HEADS, 1, 1))
FEW, MANY = SCHEDULES["two_level_atomic"], SCHEDULES["two_level_partial"]
ALIKE = SCHEDULES["one_level_atomic"]
"""Saves as many states as ``FEW``."""
ONE = BuiltVariant(VARIANT, ("layer",))
MOST = SMS // (2 * HEADS)
"""The most sequences in the first bucket."""


def build(folder: Path, few: Schedule, many: Schedule) -> ModuleType:
    """Import a package whose first bucket is served by another schedule than all others."""
    choices = [
        emit.Choice(ONE, PORTABLE, few, buckets=(Bucket.HALF,)),
        emit.Choice(ONE, PORTABLE, many, buckets=BUCKETS[1:]),
    ]
    package = import_package(folder, emit.package(emit.Origin(folder.name, "s.yaml", "0" * 12), choices))
    dispatch = operators_of(package).launches.dispatch
    assert dispatch.device_of(torch.device("cpu")) == ("portable", PORTABLE.sm_count) or torch.cuda.is_available()
    dispatch.device_of = lambda device: ("portable", SMS)
    return package


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return a package whose buckets save states at different intervals."""
    return build(tmp_path_factory.mktemp("split") / "split", FEW, MANY)


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return a package whose buckets save states at one interval."""
    return build(tmp_path_factory.mktemp("alike") / "alike", FEW, ALIKE)


@pytest.fixture
def launched(split: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return a list that the package's launchers add themselves to: (module of kernels, launcher)."""
    calls: list[tuple[str, str]] = []

    launchers = operators_of(split).launches.launchers

    def noting(name: str) -> Callable[..., Any]:
        launch = getattr(launchers, name)

        def call(kernels: ModuleType, *arguments: Any) -> Any:
            calls.append((kernels.__name__.split(".")[-1], name))
            return launch(kernels, *arguments)

        return call

    for name in ("forward", "backward", "step"):
        monkeypatch.setattr(launchers, name, noting(name))
    return calls


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Forget what other tests compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def draw(device: torch.device, batch: int, steps: int = 3) -> Inputs:
    """Return operands of ``batch`` sequences."""
    return make_inputs(VARIANT, Problem(batch, steps, initial_state=True), seed=batch + steps).to(device)


REFERENCE = eager(VARIANT, own_arithmetic(VARIANT))
"""The eager recurrence in the kernels' arithmetic."""


@pytest.mark.parametrize("lay_out", [lambda inputs: inputs, packed], ids=["batch", "packed"])
@pytest.mark.parametrize(("batch", "schedule"), [(MOST, FEW), (MOST + 1, MANY)], ids=["few", "many"])
def test_forward_and_backward_run_by_the_bucket_of_the_call(
    split, launched, device, batch: int, schedule: Schedule, lay_out: Callable[[Inputs], Inputs]
) -> None:
    """The number of sequences decides, however they are laid out; both directions use the same kernels, rightly."""
    inputs = lay_out(draw(device, batch))
    found = differentiate(split.m2rnn, inputs)
    module = module_name(VARIANT, schedule)
    assert launched == [(module, "forward"), (module, "backward")]
    assert_close(found, differentiate(REFERENCE, inputs), 64 * EPS)


def test_steps_of_decoding(split, launched, device) -> None:
    """A step is served by the bucket of its batch."""
    for batch in (MOST, MOST + 1):
        inputs = draw(device, batch, 1)
        token = {name: getattr(inputs, name)[:, 0] for name in ("q", "k", "v", "forget")}
        y, _ = split.m2rnn_step(**token, weight=inputs.weight, state=inputs.initial_state.clone())
        expected, _ = split.m2rnn(*(getattr(inputs, n) for n in ("q", "k", "v", "weight", "forget", "initial_state")))
        assert_close({"y": y}, {"y": expected[:, 0]}, 16 * EPS)
    modules = [module_name(VARIANT, FEW)] * 2 + [module_name(VARIANT, MANY)] * 2
    assert launched == list(zip(modules, ["step", "forward"] * 2, strict=True))


def test_the_package_and_the_database_count_alike(split) -> None:
    """The bounds in the generated code are those of ``m2gen.bucket``, for every GPU and head count."""
    dispatch = operators_of(split).launches.dispatch
    for heads in (1, 2, 7, 84, 132, 4096, 65535):
        for sms in (1, 84, 108, 114, 132, 304):
            generated = tuple(halves * sms // (2 * heads) for halves in dispatch.built.HALVES)
            assert generated == most_sequences(heads, sms)
    (variant,) = dispatch.built.VARIANTS
    table, most = dispatch.table_of(variant, torch.device("cpu"))
    assert most == most_sequences(HEADS, SMS)
    few, many = module_name(VARIANT, FEW), module_name(VARIANT, MANY)
    assert [module.__name__.split(".")[-1] for module in table] == [few] + [many] * 5


@pytest.fixture
def idle(split: ModuleType, alike: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have launchers allocate what kernels would write: what is compiled is about shapes."""

    def count(kernels: ModuleType, q: Tensor, offsets: Tensor | None) -> int:
        return sizes(plan_of(kernels), q, offsets)[-1]

    def forward(kernels, operands, first, offsets, save, *_):
        q, _, v, *_ = operands
        shape = (HEADS, q.shape[-1], v.shape[-1])
        return (
            v.new_zeros(*v.shape[:-2], HEADS, v.shape[-1]),
            q.new_zeros(len(q), *shape),
            q.new_zeros(count(kernels, q, offsets) if save else 0, *shape),
        )

    def backward(kernels, dy, dstate, operands, checkpoints, offsets, *_):
        q, k, v, weight, forget, *_ = operands
        assert len(checkpoints) == count(kernels, q, offsets), "of another bucket's forward"
        state = q.new_zeros(len(q), HEADS, q.shape[-1], v.shape[-1])
        return [torch.zeros_like(x) for x in (q, k, v, weight, forget, state)]

    for package in (split, alike):
        launchers = operators_of(package).launches.launchers
        monkeypatch.setattr(launchers, "forward", forward)
        monkeypatch.setattr(launchers, "backward", backward)


def graphs() -> int:
    """Return how many graphs were compiled since dynamo was reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compiled(package: ModuleType) -> Callable[..., Any]:
    """Return the operator compiled for any size; the first call's sizes should all differ, or torch ties them."""
    return torch.compile(package.m2rnn, fullgraph=True, dynamic=True, backend="aot_eager")


def graphs_after(package: ModuleType, device: torch.device, batches: Iterable[int]) -> list[int]:
    """Call a compiled operator on batches of growing length, compare with eager, and count graphs after each."""
    operator, counts = compiled(package), []
    for steps, batch in enumerate(batches, 5):
        inputs = draw(device, batch, steps)
        assert_close(differentiate(operator, inputs), differentiate(package.m2rnn, inputs), 16 * EPS)
        counts.append(graphs())
    return counts


def test_compiled_once_for_each_bucket(split, idle, device) -> None:
    """Where the saved states depend on the bucket, each bucket compiles once, and no length ever does."""
    assert graphs_after(split, device, (MOST + 1, MOST + 2, MOST, MOST + 3, MOST - 1)) == [1, 1, 2, 2, 2]


def test_compiled_once_for_all_buckets_that_save_alike(alike, idle, device) -> None:
    """Where every bucket saves the same states, none shows in what is compiled."""
    assert graphs_after(alike, device, (MOST + 1, MOST, 3 * MOST, MOST - 1)) == [1, 1, 1, 1]


def test_inference_is_compiled_once_for_all_buckets(split, idle, device) -> None:
    """Without gradients nothing is saved, so the bucket does not show either."""
    operator = compiled(split)
    for steps, batch in enumerate((MOST + 1, MOST, 3 * MOST), 5):
        inputs = draw(device, batch, steps)
        operands = [getattr(inputs, name) for name in ("q", "k", "v", "weight", "forget", "initial_state")]
        with torch.no_grad():
            y, _ = operator(*operands)
            expected, _ = split.m2rnn(*operands)
        assert_close({"y": y}, {"y": expected}, 16 * EPS)
    assert graphs() == 1
