"""Tokens for columns over ranks, and back: each is the other's gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from .collectives import all_to_all, dense


def _to_heads(x: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Return (B, S, C), all tokens of this rank's columns, of x (B, S_r, R C)."""
    ranks = len(counts)
    batch, here, width = x.shape
    channels = width // ranks
    send = dense(torch.unflatten(x, -1, (ranks, channels)).permute(2, 0, 1, 3))
    sizes = [batch * count * channels for count in counts]
    flat = all_to_all(send.flatten(), [batch * here * channels] * ranks, sizes, group)
    if len(set(counts)) == 1:
        return dense(flat.view(ranks, batch, here, channels).transpose(0, 1)).flatten(1, 2)
    parts = zip(torch.split(flat, sizes), counts, strict=True)
    return torch.cat([part.view(batch, count, channels) for part, count in parts], 1)


def _to_tokens(y: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Return (B, S_r, R C), this rank's tokens of all columns, of y (B, S, C)."""
    ranks, here = len(counts), counts[group.rank()]
    batch, _, channels = y.shape
    if len(set(counts)) == 1:
        flat = dense(torch.unflatten(y, 1, (ranks, here)).transpose(0, 1)).flatten()
    else:
        flat = torch.cat([part.flatten() for part in torch.split(y, list(counts), 1)])
    sizes = [batch * count * channels for count in counts]
    back = all_to_all(flat, sizes, [batch * here * channels] * ranks, group)
    return dense(back.view(ranks, batch, here, channels).permute(1, 2, 0, 3)).flatten(2)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return _to_heads(x, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _to_tokens(gradient, ctx.counts, ctx.group), None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return _to_tokens(y, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _to_heads(gradient, ctx.counts, ctx.group), None, None


_heads: Callable[[Tensor, Sequence[int], ProcessGroup], Tensor] = _ToHeads.apply
_tokens: Callable[[Tensor, Sequence[int], ProcessGroup], Tensor] = _ToTokens.apply


def to_heads(x: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Return this rank's columns (B, S, C) of all tokens, of x (B, S_r, R C), its tokens' columns of all R ranks.

    ``counts`` are the tokens of each sequence on each rank.
    """
    return _heads(x, counts, group)


def to_tokens(y: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Return what ``to_heads`` takes, of what it gives."""
    return _tokens(y, counts, group)
