"""Dtypes in which the operator takes what it is given."""

from __future__ import annotations

import torch
from torch import Tensor


def float32(x: Tensor | None) -> Tensor | None:
    """Return a tensor in float32 and contiguous."""
    return x if x is None else x.float().contiguous()


def autocasts(kind: str) -> bool:
    """Whether autocast is on for devices of a kind."""
    return kind != "meta" and torch.is_autocast_enabled(kind)  # torch knows no autocast of meta tensors


def autocast(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, forget: Tensor) -> tuple[Tensor, ...]:
    """Return the operands in autocast's dtype where it is on; a weight or gate in float32 loses nothing."""
    if not (isinstance(q, Tensor) and autocasts(q.device.type)):
        return q, k, v, weight, forget
    dtype = torch.get_autocast_dtype(q.device.type)

    def cast(x: Tensor, kept: tuple[torch.dtype, ...]) -> Tensor:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in kept
        return x.to(dtype) if eligible else x

    narrow, wide = (torch.float64,), (torch.float64, torch.float32)
    return (*(cast(x, narrow) for x in (q, k, v)), *(cast(x, wide) for x in (weight, forget)))
