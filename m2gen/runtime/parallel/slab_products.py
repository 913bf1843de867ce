"""The projections around an exchange: products that write the slabs which are sent, and read those that arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..mixer import wide_dtype
from .normed import Normed, scaled_backward, scaled_rows
from .slabs import Route, even_widths, to_heads, to_tokens


class _ProductToHeads(torch.autograd.Function):
    """The product with rows of a weight, one rank's after the other's, of which each rank gets its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, route: Route) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.route = route
        rows = torch.unflatten(weight, 0, (route.ranks, -1))
        biases = None if bias is None else torch.unflatten(bias, 0, (route.ranks, -1))

        def fill(slab: Tensor, rank: int, piece: slice) -> None:
            if biases is None:
                _multiply(x[piece], rows[rank].T, slab)
            else:
                slab.copy_(biases[rank])
                _add_product(slab, x[piece], rows[rank].T)

        whole = x.new_empty(x.shape[0], sum(route.counts), rows.shape[1])
        return to_heads(fill, whole, route)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        route, (of_x, of_weight, of_bias, _) = ctx.route, ctx.needs_input_grad
        tokens, rows = x.flatten(0, 1), torch.unflatten(weight, 0, (ctx.route.ranks, -1))
        dx = tokens.new_empty(tokens.shape) if of_x else None
        drows = torch.empty_like(rows) if of_weight else None
        dbiases = rows.new_empty(rows.shape[:2]) if of_bias else None

        def take(slab: Tensor, rank: int) -> None:
            slab = slab.flatten(0, 1)
            if dx is not None:
                _accumulate(dx, slab, rows[rank], first=rank == route.rank)
            if drows is not None:
                torch.mm(slab.T, tokens, out=drows[rank])
            if dbiases is not None:
                torch.sum(slab, 0, out=dbiases[rank])

        to_tokens(take, gradient, route)
        found = (dx, x.shape), (drows, weight.shape), (dbiases, weight.shape[:1])
        return *(None if y is None else y.view(shape) for y, shape in found), None


class _NormedFromHeads(torch.autograd.Function):
    """The product with columns of a weight, of heads that come from their ranks, and the norm of these after it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, norm: Normed, route: Route) -> Tensor:
        columns = [weight[:, own] for own in even_widths(weight.shape[1], route.ranks)]
        batch, here = y.shape[0], route.counts[route.rank]
        mixed = y.new_empty(batch * here, weight.shape[0])
        squares = y.new_zeros(batch * here, 1, dtype=wide_dtype(y))

        def take(slab: Tensor, rank: int) -> None:
            slab = slab.flatten(0, 1)
            squares.add_(norm.squares(slab))
            _accumulate(mixed, slab, columns[rank].T, first=rank == route.rank)

        slabs = to_tokens(take, y, route)
        out, scale = scaled_rows(mixed, squares, norm)
        ctx.save_for_backward(slabs, weight, mixed, scale)
        ctx.norm, ctx.route = norm, route
        return out.view(batch, here, weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slabs, weight, mixed, scale = ctx.saved_tensors
        route, norm = ctx.route, ctx.norm
        own = even_widths(weight.shape[1], route.ranks)
        dmixed, dsquares = scaled_backward(gradient.flatten(0, 1), mixed, scale, norm)
        twice = (2 * dsquares).to(slabs.dtype).view(*gradient.shape[:-1], 1)
        by_sequence, (_, batch, _, channels) = dmixed.view(gradient.shape), slabs.shape
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None

        def fill(slab: Tensor, rank: int, piece: slice) -> None:
            torch.mul(slabs[rank, piece], twice[piece], out=slab)
            _add_product(slab, by_sequence[piece], weight[:, own[rank]])

        def products() -> None:
            if dweight is not None:
                for rank in range(route.ranks):
                    torch.mm(dmixed.T, slabs[rank].flatten(0, 1), out=dweight[:, own[rank]])

        dy = slabs.new_empty(batch, sum(route.counts), channels)
        return to_heads(fill, dy, route, products), dweight, None, None


def _multiply(x: Tensor, y: Tensor, out: Tensor) -> None:
    """Put products of x (B, S, H) by one matrix into rows (B, S, C), which may lie apart from sequence to sequence."""
    if out.is_contiguous():
        torch.mm(x.flatten(0, 1), y, out=out.flatten(0, 1))
    else:
        torch.bmm(x, y.expand(len(x), *y.shape), out=out)


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add them."""
    if total.is_contiguous():
        total.flatten(0, 1).addmm_(x.flatten(0, 1), y)
    else:
        total.baddbmm_(x, y.expand(len(x), *y.shape))


def _accumulate(total: Tensor, x: Tensor, y: Tensor, *, first: bool) -> None:
    """Put x y into a matrix, or add it."""
    if first:
        torch.mm(x, y, out=total)
    else:
        total.addmm_(x, y)


_product: Callable[[Tensor, Tensor, Tensor | None, Route], Tensor] = _ProductToHeads.apply
_normed: Callable[[Tensor, Tensor, Normed, Route], Tensor] = _NormedFromHeads.apply


def product_to_heads(x: Tensor, weight: Tensor, bias: Tensor | None, route: Route) -> Tensor:
    """Return this rank's columns (B, S, C) of all tokens: of x (B, S_r, H) by a weight (R C, H), by rank."""
    return _product(x, weight, bias, route)


def normed_from_heads(y: Tensor, weight: Tensor, norm: Normed, route: Route) -> Tensor:
    """Return this rank's tokens by a weight (H, R C), normalised: of y (B, S, C), all tokens of its heads."""
    return _normed(y, weight, norm, route)
