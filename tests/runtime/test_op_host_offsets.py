"""Offsets that come with a copy on the host: the copy is checked, and the device is not asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import arguments, assert_same, offsets_of
from layer import layered, make_layer, tokens, with_gradients
from support import make_variant
from torch import Tensor
from watch import Watch

from m2gen.problem import Problem, make_inputs

LENGTHS = (3, 0, 2)
BACKENDS = ("kernels", "reference")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the package that serves the calls of these tests."""
    return layered(tmp_path_factory.mktemp("host_offsets"))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tensor], Watch]]:
    """Return what watches a tensor for the rest of the test."""
    with monkeypatch.context() as patch:
        yield lambda watched: Watch(patch, watched)


def operands(device: torch.device, backend: str) -> dict[str, Any]:
    """Return the arguments of a packed call of five tokens."""
    inputs = make_inputs(make_variant(), Problem(0, 0, lengths=LENGTHS, initial_state=True), 0).to(device)
    return {**arguments(inputs), "backend": backend}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_reads_the_copy_alone(package, device, watch, backend) -> None:
    """Results have the bits of a call without the copy, and the device's offsets are never read; else they are."""
    call = operands(device, backend)
    expected = package.m2rnn(**call)
    host = call["cu_seqlens"].cpu().clone()
    fresh = {**call, "cu_seqlens": call["cu_seqlens"].clone()}
    seen = watch(fresh["cu_seqlens"])
    given = package.m2rnn(**fresh, cu_seqlens_cpu=host)
    assert [name for name in seen.found if not _of_the_interpreter(name)] == []
    assert_same(dict(zip("ys", given, strict=True)), dict(zip("ys", expected, strict=True)))
    package.m2rnn(**fresh)
    assert "tolist" in seen.found


def _of_the_interpreter(name: str) -> bool:
    """Whether Triton's interpreter calls it on every tensor that it is given, in place of a launch."""
    return name in ("cpu", "to") and not torch.cuda.is_available()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layer_reads_the_copy_alone(package, device, watch, backend) -> None:
    """Training on packed batches, prefill and ``scan`` never read the device's offsets."""
    layer, x = make_layer(package, backend=backend).to(device), tokens(device, sum(LENGTHS))
    host = offsets_of(LENGTHS)
    expected = with_gradients(layer, x, cu_seqlens=host.to(device).clone())
    fresh = host.clone().to(device)
    seen = watch(fresh)
    assert_same(with_gradients(layer, x, cu_seqlens=fresh, cu_seqlens_cpu=host), expected)
    assert torch.equal(layer.scan(x, cu_seqlens=fresh, cu_seqlens_cpu=host)[0], expected["y"])
    with torch.no_grad():
        cache = layer.allocate_cache(len(LENGTHS))
        assert torch.equal(layer(x, cache, cu_seqlens=fresh, cu_seqlens_cpu=host), expected["y"])
    assert {"tolist", "item", "__bool__", "__int__", "__index__"}.isdisjoint(seen.found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_copy_is_checked(package, device, backend) -> None:
    """A copy that lies is refused by what it holds, whatever the device has."""
    call = operands(device, backend)
    for host, message in (
        ([0, 4, 3, 5], "cu_seqlens must not decrease, got 3 at index 2 after 4"),
        ([1, 3, 3, 5], "cu_seqlens must start at 0, got 1"),
        ([0, 3, 3, 6], "cu_seqlens must end at the 5 tokens of q, got 6"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            package.m2rnn(**call, cu_seqlens_cpu=torch.tensor(host))


def test_the_word_of_the_caller_is_taken(package, device) -> None:
    """The device's offsets are not looked at: kernels stay inside the tensors, whatever they hold."""
    call = operands(device, "kernels")
    host, wrong = call["cu_seqlens"].cpu().clone(), torch.tensor([0, 9, -4, 2], dtype=torch.int32, device=device)
    y, _ = package.m2rnn(**{**call, "cu_seqlens": wrong}, cu_seqlens_cpu=host)
    assert y.shape == (5, 2, 16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_either_dtype_will_do(package, device, dtype) -> None:
    """The copy and the offsets may differ in dtype."""
    call = operands(device, "kernels")
    host = call["cu_seqlens"].cpu().to(dtype)
    assert torch.equal(package.m2rnn(**call, cu_seqlens_cpu=host)[0], package.m2rnn(**call)[0])


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "list": ([0, 3, 3, 5], TypeError, "cu_seqlens_cpu must be a tensor, got list"),
    "meta": (
        torch.zeros(4, dtype=torch.int32, device="meta"),
        ValueError,
        "cu_seqlens_cpu must be on the CPU, got meta",
    ),
    "shape": (torch.tensor([0, 5]), ValueError, "cu_seqlens_cpu must be (4,) as cu_seqlens is, got (2,)"),
    "dtype": (torch.zeros(4), TypeError, "cu_seqlens_cpu must be torch.int32 or torch.int64, got torch.float32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_copy_is_refused(package, device, name) -> None:
    """One line says what it must be and what came, of the operator and of the layer."""
    host, kind, message = WRONG[name]
    layer, x = make_layer(package).to(device), tokens(device, sum(LENGTHS))
    with pytest.raises(kind, match=f"^m2rnn: {re.escape(message)}$"):
        package.m2rnn(**operands(device, "kernels"), cu_seqlens_cpu=host)
    with pytest.raises(kind, match=f"^m2rnn: {re.escape(message)}$"):
        layer(x, cu_seqlens=offsets_of(LENGTHS).to(device), cu_seqlens_cpu=host)


def test_a_copy_comes_with_its_original(package, device) -> None:
    """A copy alone is an error, in a step of decoding too."""
    layer, message = make_layer(package).to(device), "^m2rnn: cu_seqlens_cpu must come with cu_seqlens"
    inputs = make_inputs(make_variant(), Problem(1, 2), 0).to(device)
    with pytest.raises(ValueError, match=message):
        package.m2rnn(**arguments(inputs), cu_seqlens_cpu=torch.tensor([0, 2]))
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        layer(tokens(device, 1, 1), layer.allocate_cache(1), cu_seqlens_cpu=torch.tensor([0, 1]))


def test_one_graph_with_a_copy(package, device) -> None:
    """A compiled call takes the copy as an input of its graph, and checks it when it runs."""
    call = operands(device, "kernels")
    compiled = torch.compile(package.m2rnn, fullgraph=True, backend="aot_eager")
    host = call["cu_seqlens"].cpu().clone()
    leaves = {name: call[name].clone().requires_grad_() for name in ("q", "weight")}
    given = compiled(**{**call, **leaves}, cu_seqlens_cpu=host)[0]
    found = torch.autograd.grad(given.square().sum(), list(leaves.values()))
    y = package.m2rnn(**{**call, **leaves})[0]
    expected = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    assert torch.equal(given, y)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="cu_seqlens must end at the 5 tokens of q, got 6"):
        compiled(**call, cu_seqlens_cpu=host + torch.tensor([0, 0, 0, 1], dtype=host.dtype))
