"""The layer's forget gate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .mixer import Device, wide_dtype

A_RANGE = (0.0, 16.0)
"""exp(A_log) is drawn uniformly from this range, as published."""
DT_RANGE = (1e-3, 0.1)
"""softplus(dt_bias) is drawn from this range, its logarithm uniformly, as published."""


class DecayGate(nn.Module):
    """The parameters of the forget gate: A_log and dt_bias (Nf,)."""

    def __init__(self, heads: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads, device=device, dtype=dtype))
        self.dt_bias = nn.Parameter(torch.empty(heads, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draw exp(A_log) uniform and softplus(dt_bias) log-uniform."""
        with torch.no_grad():
            self._draw()

    def _draw(self) -> None:
        tiny = torch.finfo(self.A_log.dtype).tiny  # a drawn 0 would be a head that never changes
        self.A_log.uniform_(*A_RANGE).clamp_(min=tiny).log_()
        dt = self.dt_bias.uniform_(*map(math.log, DT_RANGE)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt

    def forward(self, x: Tensor, in_kernel: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return f = exp(-exp(A_log) softplus(x + dt_bias)) of x (..., Nf) in float32.

        With ``in_kernel`` return x and copies of A_log and dt_bias in float32 or wider, for kernels that compute f;
        copies, since what wraps this module may take its parameters away after the call.
        """
        return forget_gate(self.A_log, self.dt_bias, x, in_kernel)


def forget_gate(A_log: Tensor, dt_bias: Tensor, x: Tensor, in_kernel: bool) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Do what ``DecayGate.forward`` does with these parameters."""
    if in_kernel:
        A_log, dt_bias = (p.to(wide_dtype(p), copy=True) for p in (A_log, dt_bias))
        return x, A_log, dt_bias
    return torch.exp(-A_log.float().exp() * F.softplus(x.float() + dt_bias.float()))
