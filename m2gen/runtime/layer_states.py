"""The convolution's states beside the layer's kernels: what it convolved last, and the gradient of what it began with.

Both concern a few tokens of each sequence, so torch's own operators do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layer_launches import Convolution
from .mixer import known


class Offsets(NamedTuple):
    """Where sequences begin and how long they are, (B, 1) each, among so many tokens."""

    starts: Tensor
    lengths: Tensor
    tokens: int


def offsets_of(projected: Tensor, cu_seqlens: Tensor | None) -> Offsets:
    """Return the offsets of projected (B, S, P), or of a packed batch (T, P)."""
    if cu_seqlens is not None:
        offsets = cu_seqlens.long()
        return Offsets(offsets[:-1, None], (offsets[1:] - offsets[:-1])[:, None], projected.shape[0])
    batch, steps = projected.shape[:2]
    starts = steps * torch.arange(batch, device=projected.device)[:, None]
    return Offsets(starts, torch.full_like(starts, steps), batch * steps)


def last_inputs(
    projected: Tensor, before: Tensor | None, cu_seqlens: Tensor | None, channels: int, back: int
) -> Tensor:
    """Return the last ``back`` inputs (B, back, channels) of each sequence, which ``before`` or zeros precede."""
    if cu_seqlens is None and torch.compiler.is_compiling():  # which makes no more of this than is used
        first = projected.new_zeros(projected.shape[0], back, channels) if before is None else before
        return torch.cat((first, projected[..., :channels]), 1)[:, projected.shape[1] :]
    if cu_seqlens is None and projected.shape[1] >= back:
        last = projected[:, projected.shape[1] - back :, :channels]
        return last.clone(memory_format=torch.contiguous_format)  # a view would keep the whole projection
    at = offsets_of(projected, cu_seqlens)
    within = at.lengths - back + torch.arange(back, device=projected.device)  # (B, back), from the sequence's start
    found = _picked(projected.flatten(0, -2)[:, :channels], at.starts + within)
    if before is None:
        return torch.where((within >= 0)[..., None], found, 0)
    earlier = (back + within).clamp(0, max(back - 1, 0))[..., None].expand(-1, -1, channels)
    return torch.where((within >= 0)[..., None], found, before.to(projected.dtype).gather(1, earlier))


def gradient_of_first(
    a: Tensor, before: Tensor, conv: Convolution, at: Offsets, gradients: tuple[Tensor, Tensor, Tensor], bypass: Tensor
) -> Tensor:
    """Return the gradient of ``before`` (B, width - 1, C) from those of q, k and v, and D du to add to the last."""
    back = conv.width - 1
    if conv.weight is None or not back:
        return torch.zeros_like(before)
    within = torch.arange(back, device=a.device)
    there, token = (within < at.lengths)[..., None], at.starts + within
    dq, dk, dv = (_picked(x, token).float() for x in gradients)
    d = torch.where(there, torch.cat((dq, dk, dv + _picked(bypass, token).float()), -1), 0)
    inputs = torch.cat((before.float(), torch.where(there, _picked(a, token).float(), 0)), 1)
    columns = conv.weight[:, 0].float().unbind(-1)
    total = inputs.new_zeros(d.shape)
    for j, column in enumerate(columns):
        total = total + inputs[:, j : j + back] * column
    if conv.bias is not None:
        total = total + conv.bias.float()
    if conv.silu:
        gate = torch.sigmoid(total)
        d = d * gate * (1 + total * (1 - gate))
    owed = torch.zeros_like(d)
    for i in range(back):  # what step i takes of the inputs from the i-th on
        owed[:, i:] += torch.stack(columns[: back - i]) * d[:, i : i + 1]
    return owed.to(before.dtype)


def _picked(rows: Tensor, token: Tensor) -> Tensor:
    """Return rows (T, C) of tokens (B, n), inside the rows whatever unread offsets hold."""
    if known(rows.shape[0] == 0):
        return rows.new_zeros(*token.shape, rows.shape[1])
    return rows[token.clamp(0, rows.shape[0] - 1)]
