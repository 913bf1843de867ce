"""Projections over ranks: a rank's rows or columns of a weight, with what ranks hand each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from .collectives import all_gather, all_reduce, copied, gathered, reduce_scatter, scattered, summed


class _RowProduct(torch.autograd.Function):
    """The product with a rank's rows; ranks sum the gradient of x while each computes that of its rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scatters: bool, group: ProcessGroup
    ) -> Tensor:
        tokens = all_gather(x, x.dim() - 2, group) if scatters else x
        ctx.save_for_backward(tokens, weight)
        ctx.scatters, ctx.group = scatters, group
        return F.linear(tokens, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        finish: Callable[[], Tensor] | None = None
        if ctx.needs_input_grad[0]:
            finish = _begun(gradient @ weight, ctx.scatters, ctx.group)
        flat = gradient.flatten(0, -2)
        of_weight = flat.T @ tokens.flatten(0, -2) if ctx.needs_input_grad[1] else None
        of_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return finish and finish(), of_weight, of_bias, None, None


def _begun(x: Tensor, scatters: bool, group: ProcessGroup) -> Callable[[], Tensor]:
    """Begin to sum x over ranks in its place, or to scatter the sum; return what waits for the result."""
    part, work = reduce_scatter(x, x.dim() - 2, group) if scatters else all_reduce(x, group)

    def finish() -> Tensor:
        work.wait()
        return part

    return finish


class _ColumnProduct(torch.autograd.Function):
    """The product with a rank's columns, summed over ranks in its place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: ProcessGroup) -> Tensor:
        ctx.save_for_backward(x, weight)
        total, work = all_reduce(F.linear(x, weight), group)
        work.wait()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None


_rows: Callable[[Tensor, Tensor, Tensor | None, bool, ProcessGroup], Tensor] = _RowProduct.apply
_columns: Callable[[Tensor, Tensor, ProcessGroup], Tensor] = _ColumnProduct.apply


def by_rows(x: Tensor, weight: Tensor, bias: Tensor | None, scatters: bool, group: ProcessGroup) -> Tensor:
    """Project x (..., S, H), the same on every rank, or with ``scatters`` its part of the tokens, of which all are.

    The gradient of x is summed over ranks, or each rank has its part of the sum.
    """
    if not torch.compiler.is_compiling():
        return _rows(x, weight, bias, scatters, group)
    return F.linear(gathered(x, -2, group) if scatters else copied(x, group), weight, bias)


def by_columns(x: Tensor, weight: Tensor, scatters: bool, group: ProcessGroup) -> Tensor:
    """Project x (..., S, C), this rank's channels, to the sum over ranks, or to this rank's part of its tokens."""
    if scatters:
        return scattered(F.linear(x, weight), -2, group)
    if torch.compiler.is_compiling():
        return summed(F.linear(x, weight), group)
    return _columns(x, weight, group)
