"""Rows that a norm over several ranks scales, by the layer's kernels: against float64 and PyTorch."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import module_of
from layer import PLAIN, layered
from torch import Tensor

SIZE, EPS = 1000, 1e-5
SHAPES = {"odd": (3, 7, 523), "narrow": (5, 8), "none": (0, 40)}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the package whose layers have kernels."""
    return layered(tmp_path_factory.mktemp("norm"))


def normed_of(package: ModuleType) -> tuple[Any, Any]:
    """Return the module of norms over ranks, and a norm by kernels."""
    normed = importlib.import_module(f"{package.__name__}.parallel.normed")
    layer = package.M2RNN(24, **PLAIN)
    dims = normed.dims_of(layer)
    assert dims is not None
    return normed, normed.Normed(SIZE, EPS, dims)


def exact(x: Tensor, squares: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x / sqrt(squares / SIZE + EPS) in float64, and the gradients of both."""
    leaves = [part.double().requires_grad_() for part in (x, squares)]
    y = leaves[0] / (leaves[1] / SIZE + EPS).sqrt()
    return y.detach(), *torch.autograd.grad(y, leaves, dy.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_scale_rows(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Results are rounded once, gradients of sums are of products in float32; no element is left as memory was."""
    normed, norm = normed_of(package)
    launches = module_of(package, "layer_launches")
    plain = torch.empty_like
    monkeypatch.setattr(launches.torch, "empty_like", lambda x: plain(x).fill_(float("nan")))
    x, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    squares = SIZE * (0.1 + torch.rand(*shape[:-1], 1))
    leaves = [part.clone().requires_grad_() for part in (x, squares)]
    y = normed.scaled(*leaves, norm)
    dx, dsquares = torch.autograd.grad(y, leaves, dy)
    ulp = torch.finfo(dtype).eps
    for given, wanted, roundings in zip((y, dx, dsquares), exact(x, squares, dy), (ulp, ulp, 1e-6), strict=True):
        assert given.shape == wanted.shape
        scale = wanted.abs() if roundings == ulp else wanted.abs().max() if wanted.numel() else wanted
        assert bool(((given.double() - wanted).abs() <= roundings * scale + 1e-7).all())


def test_where_kernels_do_not_serve(package: ModuleType) -> None:
    """Wider numbers, rows out of order, and layers of the reference are PyTorch's, with the same results."""
    normed, norm = normed_of(package)
    assert normed.dims_of(package.M2RNN(24, **PLAIN, backend="reference")) is None
    assert normed.dims_of(package.M2RNN(24, **PLAIN, fused=False)) is None
    x, squares = torch.randn(12, 10), SIZE * torch.rand(12, 1)
    expected = exact(x, squares, torch.ones(12, 10))[0]
    wide, _ = normed.scaled_rows(x.double(), squares.double(), norm)
    torch.testing.assert_close(wide, expected)
    apart, _ = normed.scaled_rows(x.mT.contiguous().mT, squares, norm)
    torch.testing.assert_close(apart, expected.float())
