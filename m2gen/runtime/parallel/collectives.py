"""Collectives with gradients: what ranks hand each other, and the way back of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


def _named(name: str, before: str) -> Callable[..., Any]:
    """Return a collective of torch by its name, or by that which it had before."""
    found: Callable[..., Any] = getattr(distributed, name if hasattr(distributed, name) else before)
    return found


def _all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group)
    return total


def _all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return the ranks' x one after the other along ``dim``."""
    ranks = group.size()
    lead = x.shape[:dim]
    everything = x.new_empty(ranks * x.numel())
    _named("all_gather_single", "all_gather_into_tensor")(everything, x.contiguous().flatten(), group=group)
    return everything.view(ranks, *x.shape).movedim(0, dim).reshape(*lead, ranks * x.shape[dim], *x.shape[dim + 1 :])


def _reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return this rank's part along ``dim`` of the sum of the ranks' x."""
    ranks = group.size()
    parts = torch.unflatten(x, dim, (ranks, x.shape[dim] // ranks)).movedim(dim, 0).contiguous()
    part = torch.empty_like(parts[0])
    _named("reduce_scatter_single", "reduce_scatter_tensor")(part.view(-1), parts.view(-1), group=group)
    return part


def _all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
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
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradient, ctx.group), None


class _Summed(torch.autograd.Function):
    """The sum, whose gradient is every rank's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gathered(torch.autograd.Function):
    """Everybody's x, whose gradients are summed and handed back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(gradient, ctx.dim, ctx.group), None, None


class _Scattered(torch.autograd.Function):
    """A part of the sum, whose gradients everybody needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(gradient, ctx.dim, ctx.group), None, None


class _Exchanged(torch.autograd.Function):
    """What others send, whose gradients go back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


_copied: Callable[[Tensor, ProcessGroup], Tensor] = _Copied.apply
_summed: Callable[[Tensor, ProcessGroup], Tensor] = _Summed.apply
_gathered: Callable[[Tensor, int, ProcessGroup], Tensor] = _Gathered.apply
_scattered: Callable[[Tensor, int, ProcessGroup], Tensor] = _Scattered.apply
_exchanged: Callable[[Tensor, Sequence[int], Sequence[int], ProcessGroup], Tensor] = _Exchanged.apply


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


def exchanged(x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
    """Return what this rank is sent: of x (elements), ``sent[r]`` go to rank r, from which ``received[r]`` come."""
    return _exchanged(x, sent, received, group)
