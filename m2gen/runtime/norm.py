"""The layer's norm."""

from __future__ import annotations

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
