"""Collectives with gradients: what ranks hand each other, and the way back of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

WIDE = torch.complex128
"""Elements of 16 bytes, as which rows are copied: copies of permuted 16-bit elements take three times as long."""


def dense(x: Tensor) -> Tensor:
    """Return x, or a copy whose elements lie in order."""
    if torch.compiler.is_compiling() or x.is_contiguous() or not _may_widen(x):
        return x.contiguous()
    return x.view(WIDE).contiguous().view(x.dtype)


def copy(into: Tensor, x: Tensor) -> None:
    """Copy x, of the same shape and dtype, into a tensor."""
    if _may_widen(into) and _may_widen(x):
        into, x = into.view(WIDE), x.view(WIDE)
    into.copy_(x)


def _may_widen(x: Tensor) -> bool:
    """Whether rows of x are of elements of 16 bytes, and lie at multiples of them."""
    each = WIDE.itemsize // x.element_size()
    return x.stride(-1) == 1 and not any(n % each for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))


def _named(name: str, before: str) -> Callable[..., Any]:
    """Return a collective of torch by its name, or by that which it had before."""
    found: Callable[..., Any] = getattr(distributed, name if hasattr(distributed, name) else before)
    return found


class Done:
    """What has nothing to wait for."""

    def wait(self) -> None:
        """Do nothing."""


def all_reduce(x: Tensor, group: ProcessGroup) -> tuple[Tensor, Any]:
    """Begin to sum x, dense or copied, over ranks in its place; return that, and what to wait for."""
    x = x.contiguous()
    return x, distributed.all_reduce(x, group=group, async_op=True) or Done()


def all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return the ranks' x one after the other along ``dim``, from 0 on."""
    ranks = group.size()
    lead = x.shape[:dim]
    everything = x.new_empty(ranks * x.numel())
    _named("all_gather_single", "all_gather_into_tensor")(everything, x.contiguous().flatten(), group=group)
    joined = dense(everything.view(ranks, *x.shape).movedim(0, dim))
    return joined.view(*lead, ranks * x.shape[dim], *x.shape[dim + 1 :])


def reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> tuple[Tensor, Any]:
    """Begin to sum x over ranks; return what will be this rank's part along ``dim``, and what to wait for."""
    part, parts = _parts(x, dim, group)
    scatter = _named("reduce_scatter_single", "reduce_scatter_tensor")
    return part, scatter(part.view(-1), parts.view(-1), group=group, async_op=True) or Done()


def _parts(x: Tensor, dim: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return room for a rank's part along ``dim``, and the parts of all ranks one after the other."""
    ranks = group.size()
    parts = dense(torch.unflatten(x, dim, (ranks, x.shape[dim] // ranks)).movedim(dim, 0))
    return torch.empty_like(parts[0]), parts


def _all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group)
    return total


def _reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return this rank's part along ``dim`` of the sum of the ranks' x."""
    part, parts = _parts(x, dim, group)
    _named("reduce_scatter_single", "reduce_scatter_tensor")(part.view(-1), parts.view(-1), group=group)
    return part


def all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
    """Return what the ranks send to this one, one after the other, of x (elements)."""
    result = x.new_empty(sum(received))
    even = len({*sent, *received}) == 1
    into, outof = (None, None) if even else (list(received), list(sent))
    distributed.all_to_all_single(result, x.contiguous(), into, outof, group=group)
    return result


class _Copied(torch.autograd.Function):
    """x as it is, whose gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradient, ctx.group), None


class _Summed(torch.autograd.Function):
    """The sum, whose gradient is every rank's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gathered(torch.autograd.Function):
    """Everybody's x, whose gradients are summed and handed back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(gradient, ctx.dim, ctx.group), None, None


class _Scattered(torch.autograd.Function):
    """A part of the sum, whose gradients everybody needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(gradient, ctx.dim, ctx.group), None, None


_copied: Callable[[Tensor, ProcessGroup], Tensor] = _Copied.apply
_summed: Callable[[Tensor, ProcessGroup], Tensor] = _Summed.apply
_gathered: Callable[[Tensor, int, ProcessGroup], Tensor] = _Gathered.apply
_scattered: Callable[[Tensor, int, ProcessGroup], Tensor] = _Scattered.apply


def copied(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return x, the same on every rank; its gradient is the sum of what the ranks contribute."""
    return _copied(x, group)


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of the ranks' x on every rank, whose gradient is the same on every rank."""
    return _summed(x, group)


def gathered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return the ranks' x, of one shape, in their order along ``dim``; gradients are summed, each rank has its part."""
    return _gathered(x, dim % x.dim(), group)


def scattered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return this rank's part along ``dim`` of the sum of the ranks' x; its gradient is gathered."""
    return _scattered(x, dim % x.dim(), group)
