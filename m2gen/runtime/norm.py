"""The layer's norm, and what may be in its place."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .mixer import Device, wide_dtype


class RMSNorm(nn.Module):
    """x / rms(x) times a weight, computed in float32 or wider, in x's dtype."""

    def __init__(self, size: int, eps: float, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Fill the weight with ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim of x (..., size)."""
        wide = x.to(wide_dtype(x))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def make_norm(
    name: Literal["rmsnorm", "layernorm"] | None,
    size: int,
    eps: float,
    device: Device = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return the norm of that name, whose parameters are not drawn yet; the identity for None."""
    if name is None:
        return nn.Identity()
    if name == "layernorm":
        return nn.LayerNorm(size, eps, device=device, dtype=dtype)
    return RMSNorm(size, eps, device, dtype)
