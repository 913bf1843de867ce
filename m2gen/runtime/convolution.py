"""The layer's causal convolution: a module on inputs that follow what was convolved before, packed or not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DepthwiseConv1d"]


class DepthwiseConv1d(nn.Conv1d):
    """An ``nn.Conv1d`` that is a sum of shifted products in float32, or wider, where it is depthwise and pads nothing.

    Compilers fuse these into one pass, and a result has the same bits wherever its inputs lie. Whatever else an adapter
    makes of this class, such as low-rank factors over all channels, is as in ``nn.Conv1d``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (B, C, L) to (B, C, L - width + 1), in x's dtype."""
        plain = self.stride == (1,) and self.dilation == (1,) and self.padding == (0,)
        if plain and self.groups == self.in_channels == self.out_channels:
            return depthwise(x, self.weight, self.bias)
        return super().forward(x)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Sum shifts of x (..., C, L), the oldest first, times the columns of weight (C, 1, width)."""
    x = x.mT  # as it lies in memory; gradients of its slices are made in this order
    dtype = torch.promote_types(x.dtype, torch.float32)
    columns = weight[:, 0].to(dtype).unbind(-1)
    steps = x.shape[-2] - len(columns) + 1
    total = x[..., :steps, :] * columns[0]
    for i, column in enumerate(columns[1:], 1):
        total = total + x[..., i : i + steps, :] * column
    return (total if bias is None else total + bias.to(dtype)).to(x.dtype).mT


def convolve(
    conv1d: nn.Module | None, x: Tensor, width: int | None, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Call the module on x (B, S, C) after ``before`` (B, width - 1, C), zeros if None.

    Returns the result and the last width - 1 inputs; x and none of them where there is no module.
    """
    if conv1d is None or width is None:
        return x, x[:, x.shape[1] :]
    back = width - 1
    inputs = F.pad(x, (0, 0, back, 0)) if before is None else torch.cat((before.to(x.dtype), x), 1)
    return _called(conv1d, inputs, width), inputs[:, x.shape[1] :]


def convolve_packed(
    conv1d: nn.Module | None, x: Tensor, width: int | None, cu_seqlens: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Do the same for sequences one after the other in x (T, C): none sees the one before it.

    Each is laid out after its own ``before``, so that one call of the module serves all of them.
    """
    tokens, batch = x.shape[0], cu_seqlens.shape[0] - 1
    if conv1d is None or width is None:
        return x, x.new_empty(batch, 0, x.shape[1])
    back = width - 1
    offsets, room = cu_seqlens.long(), tokens + batch * back
    sequences, within = torch.arange(batch, device=x.device), torch.arange(back, device=x.device)
    token = torch.arange(tokens, device=x.device)
    place = token + back * torch.bucketize(token, offsets[1:], right=True).clamp(max=max(batch - 1, 0))
    inputs = x.new_zeros(room, x.shape[1]).index_copy(0, place + back, x)
    starts, ends = offsets[:-1] + back * sequences, offsets[1:] + back * sequences
    if before is not None:
        inputs = inputs.index_copy(0, _inside(starts, within, room), before.to(x.dtype).flatten(0, 1))
    after = torch.unflatten(inputs.index_select(0, _inside(ends, within, room)), 0, (batch, back))
    return _called(conv1d, inputs[None], width)[0].index_select(0, place), after


def _inside(first: Tensor, within: Tensor, room: int) -> Tensor:
    """Return the places from each of ``first`` on, inside the inputs whatever the unread offsets hold."""
    return (first[:, None] + within).clamp(0, max(room - 1, 0)).flatten()


def _called(conv1d: nn.Module, inputs: Tensor, width: int) -> Tensor:
    """Return what the module makes of inputs (B, L, C), one result for each input that ``width`` - 1 others precede."""
    steps = inputs.shape[1] - width + 1
    if steps < 1:  # a module refuses fewer inputs than it has columns, and must be called all the same
        inputs, steps = F.pad(inputs, (0, 0, 0, 1 - steps)), max(steps, 0)
    y: Tensor = conv1d(inputs.mT).mT
    surplus = y.shape[1] - inputs.shape[1] + width - 1  # of a module that pads both ends by itself
    return y[:, surplus // 2 : surplus // 2 + steps]
