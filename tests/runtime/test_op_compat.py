"""The drop-in for the published implementation, against a transcription of what that computes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from enum import Enum
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import Results, arguments, assert_same, differentiate, distance, packed
from layer import trained
from support import build_package, make_schedule, make_variant
from torch import Tensor, nn

from m2gen.kernels.compile import load_module
from m2gen.package.emit import DROP_IN
from m2gen.problem import Draw, Inputs, Problem, make_inputs

HEADS = (2, 4, 4, 1, 2)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def package(modules) -> ModuleType:
    """Return a package whose sums do not depend on the order of programs."""
    return modules("two_level_partial", "carry")


@pytest.fixture(scope="module")
def compat(package) -> ModuleType:
    """Return its drop-in module."""
    return importlib.import_module(f"{package.__name__}.compat")


def draw(device: torch.device, heads: tuple[int, ...] = HEADS, dtype: str = "fp32", dy_scale: float = 3.0) -> Inputs:
    """Return operands of two sequences whose gradients exceed a bound of 1 now and then."""
    variant = make_variant(heads=heads, dtype=dtype)
    return make_inputs(variant, Problem(2, 3, initial_state=True), 5, Draw(dy_scale=dy_scale)).to(device)


class _Clamp(torch.autograd.Function):
    """The clamp of the published backward on the gradient from one step to the one before."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, bound: float | None) -> Tensor:
        ctx.bound = bound
        return h.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient if ctx.bound is None else gradient.clip(-ctx.bound, ctx.bound)), None


def published(query, key, value, weight, forget_input, input_state, gradient_clipping=None, cu_seqlens=None):
    """Transcribe the published recurrence: one head of one token after the other, in the operands' dtype."""
    if cu_seqlens is None:
        batches = [tuple(x[b] for x in (query, key, value, forget_input)) for b in range(query.shape[0])]
    else:
        ends = list(pairwise(cu_seqlens.tolist()))
        batches = [tuple(x[a:b] for x in (query, key, value, forget_input)) for a, b in ends]
    bound = None if gradient_clipping is None else abs(gradient_clipping)
    heads = input_state.shape[1]
    outputs, states = [], []
    for (q, k, v, f), start in zip(batches, input_state, strict=True):
        columns, last = [], []
        for n in range(heads):
            h, ys = start[n], []
            w = weight[n * weight.shape[0] // heads]
            for t in range(len(q)):
                k_t, v_t, q_t = (x[t, n * x.shape[1] // heads] for x in (k, v, q))
                f_t = f[t, n * f.shape[1] // heads]
                h = f_t * h + (1 - f_t) * torch.tanh(h @ w + torch.outer(k_t, v_t))
                ys.append(q_t @ h)
                h = _Clamp.apply(h, bound)  # what flows back from later steps and the final state, not from y
            columns.append(torch.stack(ys))
            last.append(h)
        outputs.append(torch.stack(columns, 1))
        states.append(torch.stack(last))
    return (torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs)), torch.stack(states)


NAMES = ("query", "key", "value", "weight", "forget_input", "input_state")


def call(function: Any, inputs: Inputs, dtype: torch.dtype | None = None, **options: Any) -> Results:
    """Return results and gradients of a function with the published arguments."""

    def operator(q, k, v, weight, forget, initial_state, cu_seqlens=None):
        named = dict(zip(NAMES, (q, k, v, weight, forget, initial_state), strict=True))
        if dtype is not None:
            named = {name: x.to(dtype) for name, x in named.items()}
        more = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens, **options.pop("packed", {})}
        return function(**named, **options, **more)

    return differentiate(operator, inputs)


@pytest.mark.parametrize("clipping", [None, 1.0, -0.5, 1e-3])
def test_equals_the_published_recurrence(compat, device, clipping) -> None:
    """Results and gradients are those of the published equations, at, above and below the clipping."""
    inputs = draw(device)
    given = call(compat.m2rnn, inputs, gradient_clipping=clipping)
    expected = call(published, inputs, torch.float64, gradient_clipping=clipping)
    assert given.keys() == expected.keys()
    # a few hundred float32 products and sums; another meaning of the clipping differs by tens of percent
    assert {name: e for name in given if (e := distance(given[name], expected[name])) > 64 * EPS} == {}


def test_the_clippings_of_that_test_differ(device) -> None:
    """The results that the test above compares differ in their first digits without the clipping."""
    inputs = draw(device)
    free, bound = (call(published, inputs, torch.float64, gradient_clipping=c) for c in (None, 1.0))
    assert min(distance(bound[f"d{name}"], free[f"d{name}"]) for name in ("k", "v", "weight", "forget")) > 0.01


MODEL = """
from {origin} import m2rnn
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 16 + 16 + 32 + 2)
        self.weight = nn.Parameter(torch.eye(16).repeat(2, 1, 1))
        self.start = nn.Parameter(torch.zeros(2, 16, 16))

    def forward(self, x):
        q, k, v, gate = self.project(x).split([16, 16, 32, 2], -1)
        output, state = m2rnn(
            query=q.unflatten(-1, (1, 16)),
            key=k.unflatten(-1, (1, 16)),
            value=v.unflatten(-1, (2, 16)),
            weight=self.weight,
            forget_input=gate.sigmoid(),
            input_state=self.start.expand(x.shape[0], -1, -1, -1),
            gradient_clipping=0.1,
        )
        return output.flatten(-2) + state.mean((1, 2, 3))[:, None, None]
"""
"""A model's file, but for where the recurrence comes from."""


@pytest.fixture
def model_on(tmp_path, monkeypatch, device) -> Callable[[str], nn.Module]:
    """Return a function that makes a model whose file imports the recurrence from a module, always of equal weights."""
    stand_in = ModuleType("published_m2rnn")
    stand_in.m2rnn = published  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)

    def make(origin: str) -> nn.Module:
        path = tmp_path / f"model_on_{origin.replace('.', '_')}.py"
        path.write_text(MODEL.format(origin=origin), encoding="utf-8")
        torch.manual_seed(0)
        model: nn.Module = load_module(path, f"{tmp_path.name}_{path.stem}").Model()
        return model.to(device)

    return make


@pytest.mark.parametrize("of_package", [False, True], ids=["published", "compat"])
def test_a_model_switches_by_its_import(compat, device, model_on, of_package) -> None:
    """The same file trains alike, with the same parameters, whichever module its ``m2rnn`` is imported from."""
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)).to(device)
    exact = trained(model_on("published_m2rnn").double(), x.double())
    given = trained(model_on(compat.__name__ if of_package else "published_m2rnn"), x)
    assert given.keys() == exact.keys()
    assert {name: e for name in exact if (e := distance(given[name], exact[name])) > 64 * EPS} == {}
    assert all(x.dtype is torch.float32 and x.norm() > 0 for x in given.values())


def test_packed_as_published(compat, device) -> None:
    """A packed batch, with the longest length beside its offsets, as an int or as a tensor."""
    inputs = packed(draw(device))
    expected = call(published, inputs, torch.float64, gradient_clipping=1.0)
    as_int = call(compat.m2rnn, inputs, gradient_clipping=1.0, packed={"max_seqlen": 3})
    as_tensor = call(compat.m2rnn, inputs, gradient_clipping=1.0, packed={"max_seqlen": torch.tensor(3, device=device)})
    assert as_int["y"].shape == (6, 4, 16)
    assert {name: e for name in as_int if (e := distance(as_int[name], expected[name])) > 64 * EPS} == {}
    assert_same(as_int, as_tensor)


@pytest.mark.parametrize("bound", [None, 0.5])
def test_is_the_operator_under_another_name(package, compat, device, bound) -> None:
    """The same bits as ``m2rnn``, whose default is a bound of 1, with the bound said."""
    inputs = draw(device)
    given = call(compat.m2rnn, inputs, gradient_clipping=None if bound is None else -bound)
    assert_same(given, differentiate(package.m2rnn, inputs, clip=bound))


def test_positions_defaults_and_dtypes(package, compat, device) -> None:
    """Arguments may come by position; the state comes, and goes back, in the key's dtype; without one, it is zeros."""
    inputs = draw(device, (1, 1, 2, 2, 2), "bf16")
    operands = [getattr(inputs, name) for name in ("q", "k", "v", "weight", "forget")]
    y, state = compat.m2rnn(*operands)
    expected, wide = package.m2rnn(*operands, clip=None)
    assert torch.equal(y, expected)
    assert state.dtype == torch.bfloat16
    assert torch.equal(state, wide.bfloat16())
    again, last = compat.m2rnn(*operands, state, 1.0, None, None)
    assert (again.dtype, last.dtype) == (torch.bfloat16, torch.bfloat16)
    leaf = state.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(compat.m2rnn(*operands, leaf)[0].float().sum(), leaf)
    assert gradient.dtype == torch.bfloat16


def test_the_longest_length_comes_with_offsets_and_only_then(compat, device) -> None:
    """One without the other is an error that says which came."""
    inputs = draw(device, (1, 1, 2, 2, 2))
    unpacked = [getattr(inputs, name) for name in ("q", "k", "v", "weight", "forget")]
    with pytest.raises(ValueError, match=r"^m2rnn: cu_seqlens and max_seqlen must be given together, got only max_seq"):
        compat.m2rnn(*unpacked, max_seqlen=3)
    flat = arguments(packed(inputs), ("q", "k", "v", "weight", "forget"))
    offsets = torch.tensor([0, 3, 6], device=device)
    with pytest.raises(ValueError, match=r"^m2rnn: cu_seqlens and max_seqlen must be given together, got only cu_seq"):
        compat.m2rnn(*flat.values(), cu_seqlens=offsets)


class Backend(Enum):
    """Some of the names that the published enum has."""

    triton = "triton"
    cuda = "cuda"
    torch = "torch"
    pallas = "pallas"


@pytest.mark.parametrize(
    ("named", "backend"),
    [
        (None, "kernels"), (Backend.triton, "kernels"), (Backend.cuda, "kernels"), ("triton", "kernels"),
        (Backend.torch, "reference"), ("torch", "reference"),
    ],
)  # fmt: skip
def test_a_named_backend(package, compat, device, named, backend) -> None:
    """The published enum's members, and their values, name what runs; the bits are the operator's with that backend."""
    inputs = draw(device)
    given = call(compat.m2rnn, inputs, gradient_clipping=0.5, kernel_backend=named)
    assert_same(given, differentiate(package.m2rnn, inputs, clip=0.5, backend=backend))


@pytest.mark.parametrize("named", [Backend.pallas, "jax"])
def test_a_backend_that_is_not_here(compat, device, named) -> None:
    """Others are an error that names the argument."""
    message = "^m2rnn: kernel_backend must be None or one of triton, cuda, torch, got "
    with pytest.raises(ValueError, match=message):
        call(compat.m2rnn, draw(device), kernel_backend=named)


def test_a_package_that_clips_otherwise_has_no_drop_in() -> None:
    """Clamping the whole gradient is not what was published, so such a package does not pretend."""
    files = build_package("other", [make_variant(clip="total")], make_schedule()).files
    assert DROP_IN.isdisjoint(files)
    assert set(build_package("same", [make_variant()], make_schedule()).files) >= DROP_IN
