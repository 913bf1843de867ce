"""Tensors beyond 2^31 and 2^32 elements, value by value against small calls on the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from types import ModuleType

import pytest
import torch
from calls import Results, assert_same, changed, differentiate, packed
from layer import HIDDEN, PLAIN, layered
from support import make_variant
from torch import Tensor

from m2gen.problem import Inputs, Problem, make_inputs

BEYOND = 2**32 + 2**20
SMALL = 2**12
GPU = pytest.mark.gpu
SIZES = [pytest.param(SMALL, id="small"), pytest.param(BEYOND, marks=GPU, id="beyond_2_to_32")]
GIB = 2**30
TILE = make_variant(heads=(2, 2, 2, 2, 2), dtype="bf16")
PUBLISHED = make_variant(64, 16, (2, 2, 2, 2, 2), "bf16", tanh="approx")
"""The published models' state: programs of 32 rows whose iterations make k v^T of many steps on tensor cores."""
STREAMED = ("q", "k", "v", "weight", "forget", "dy")


def needs(device: torch.device, size: int) -> None:
    """Skip where the device has less memory than ``size`` bytes free."""
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else size
    if free < size:
        pytest.skip(f"needs {size // GIB} GiB of GPU memory, {free // GIB} are free")


def far_apart(x: Tensor, dim: int, reach: int) -> Tensor:
    """Return x in a buffer of NaN, where the last index of ``dim`` lies ``reach`` elements or more after the first."""
    dim = min(dim, x.dim() - 1)
    others = [d for d in range(x.dim()) if d != dim]
    strides = [0] * x.dim()
    strides[dim] = -(-reach // (x.shape[dim] - 1))
    for i, d in enumerate(others):
        strides[d] = prod(x.shape[other] for other in others[i + 1 :])
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    view = torch.full((size,), float("nan"), dtype=x.dtype, device=x.device).as_strided(x.shape, strides)
    return view.copy_(x)


@pytest.mark.parametrize(
    ("variant", "reach"),
    [
        pytest.param(TILE, SMALL, id="small"),
        pytest.param(TILE, BEYOND, marks=GPU, id="beyond_2_to_32"),
        pytest.param(PUBLISHED, BEYOND, marks=GPU, id="published_beyond_2_to_32"),
    ],
)
@pytest.mark.parametrize("dim", [0, 1, 2, 3], ids=["batch", "step", "head", "element"])
def test_operands_with_far_strides(built, device, dim, variant, reach) -> None:
    """Every operand and dy at once with one dim's elements 2^32 apart give the bits of contiguous ones.

    The stride of ``element`` and ``step`` itself fits 32 bits; its product with an index does not.
    """
    inputs = make_inputs(variant, Problem(2, 5, initial_state=True), seed=dim).to(device)
    needs(device, len(STREAMED) * 2 * (reach + reach // 8))
    far = changed(inputs, STREAMED, lambda x: far_apart(x, dim, reach))
    last = [(n - 1) * stride for n, stride in zip(far.q.shape, far.q.stride(), strict=True)]
    assert last[dim] >= reach
    check(built(variant), far, inputs)


@pytest.mark.parametrize("reach", SIZES)
def test_packed_operands_with_far_steps(built, device, reach) -> None:
    """A sequence of a packed batch may start 2^32 elements after the first."""
    inputs = packed(make_inputs(TILE, Problem(2, 3, initial_state=True), seed=4).to(device))
    needs(device, len(STREAMED) * 2 * (reach + reach // 8))
    check(built(TILE), changed(inputs, STREAMED, lambda x: far_apart(x, 0, reach)), inputs)


@pytest.mark.parametrize("reach", SIZES)
def test_far_elements_expanded_over_everything_else(built, device, reach) -> None:
    """Element-major operands of one step, expanded with stride 0 over the batch, the steps and the heads."""
    inputs = make_inputs(TILE, Problem(2, 5, initial_state=True), seed=5).to(device)
    names = ("q", "k", "v", "dy")
    needs(device, len(names) * 2 * (reach + reach // 8))
    far = changed(inputs, names, lambda x: far_apart(x[:1, :1, :1], 3, reach).expand(x.shape))
    check(built(TILE), far, changed(far, names, lambda x: x.contiguous()))


@pytest.mark.parametrize("reach", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dim", [0, 1, 2, 3], ids=["sequence", "head", "row", "column"])
def test_a_step_on_a_state_with_far_strides(built, device, dim, dtype, reach) -> None:
    """A state whose one dim reaches beyond 2^32 elements is read and written where it lies, and nothing around it."""
    inputs = make_inputs(PUBLISHED, Problem(2, 1, initial_state=True), seed=dim).to(device)
    needs(device, dtype.itemsize * (reach + reach // 8) + GIB)
    token = {name: getattr(inputs, name)[:, 0] for name in ("q", "k", "v", "forget")}
    near = inputs.initial_state.to(dtype)
    far = far_apart(near, dim, reach)
    assert (far.shape[dim] - 1) * far.stride(dim) >= reach
    results = {}
    for name, state in (("far", far), ("near", near)):
        y, returned = built(PUBLISHED).m2rnn_step(**token, weight=inputs.weight, state=state)
        assert returned is state
        results[name] = {"y": y, "state": state.contiguous()}
    assert_same(results["far"], results["near"])
    assert all(x.isfinite().all() for x in results["far"].values())
    memory = far.as_strided((far.untyped_storage().nbytes() // dtype.itemsize,), (1,))
    assert sum(int(part.isnan().logical_not().sum()) for part in memory.split(2**28)) == far.numel()


@pytest.mark.parametrize("reach", SIZES)
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["slot", "tap", "channel"])
def test_a_layers_step_on_inputs_with_far_strides(tmp_path, device, dim, reach) -> None:
    """The convolution's last inputs in a pool whose one dim reaches beyond 2^32 elements are moved where they lie."""
    needs(device, 4 * (reach + reach // 8) + GIB)
    torch.manual_seed(dim)
    package = layered(tmp_path)
    layer = package.M2RNN(HIDDEN, **PLAIN).to(device)
    cache, x = layer.allocate_cache(3, device=device), torch.randn(2, HIDDEN, device=device)
    near = torch.randn(cache.conv.shape, device=device)
    far, results = far_apart(near, dim, reach), {}
    for name, conv in (("far", far), ("near", near)):
        pool = package.M2RNNPool(layer, conv, torch.zeros_like(cache.state))
        with torch.no_grad():
            y = pool.step(x, torch.tensor([2, 0], device=device))
        results[name] = {"y": y, "conv": conv.contiguous()}
    assert_same(results["far"], results["near"])
    assert all(each.isfinite().all() for each in results["far"].values())


def check(package: ModuleType, far: Inputs, near: Inputs) -> None:
    """Fail unless both give the same bits."""
    given = differentiate(package.m2rnn, far, deterministic=True)
    assert_same(given, differentiate(package.m2rnn, near, deterministic=True))
    assert all(x.isfinite().all() for x in given.values())


@dataclass(frozen=True)
class Huge:
    """A batch whose y, dq, dk and dv have more elements than 32 bits count."""

    batch: int
    seq: int
    heads: int

    @property
    def elements(self) -> int:
        """Number of elements of each of y, dq, dk and dv."""
        return self.batch * self.seq * self.heads * 16

    @property
    def rows(self) -> list[int]:
        """Batch rows around the limits of 31 and 32 bits, and the first and last."""
        around = [limit // (self.elements // self.batch) for limit in (2**31, 2**32)]
        every = {0, 1, self.batch // 2, self.batch - 1, *(row + i for row in around for i in (-1, 0, 1))}
        return sorted(row for row in every if row < self.batch)


@pytest.mark.parametrize("huge", [Huge(4, 3, 2), pytest.param(Huge(16400, 1024, 16), marks=GPU)], ids=["small", "gpu"])
def test_results_with_more_than_2_to_32_elements(built, device, huge) -> None:
    """y, dq, dk, dv and the checkpoints beyond 2^32 elements: rows around each limit equal calls on them alone.

    q, k, v and dy are one sequence expanded over the batch; the gate differs from row to row, and so does every result.
    """
    if device.type == "cuda":
        assert huge.elements > 2**32
        needs(device, 68 * GIB)
    variant = make_variant(heads=(huge.heads, huge.heads, huge.heads, 1, huge.heads), dtype="bf16")
    one = make_inputs(variant, Problem(1, huge.seq), seed=6).to(device)
    gates = torch.rand(huge.batch, huge.seq, 1, generator=torch.Generator().manual_seed(6)).to(one.q)
    inputs = changed(one, ("q", "k", "v", "dy", "dstate"), lambda x: x.expand(huge.batch, *x.shape[1:]))
    inputs = replace(inputs, forget=gates)
    wanted = ("q", "k", "v", "forget")
    results = differentiate(built(variant).m2rnn, inputs, wanted, deterministic=True)
    for name in ("y", "dq", "dk", "dv"):
        assert results[name].numel() == huge.elements
    for row in huge.rows:
        alone = replace(one, forget=gates[row : row + 1])
        expected = differentiate(built(variant).m2rnn, alone, wanted, deterministic=True)
        assert_same(_row(results, row), expected)
    assert all(part.isfinite().all() for x in results.values() for part in x.split(1024))


def _row(results: Results, row: int) -> Results:
    return {name: x[row : row + 1] for name, x in results.items()}
