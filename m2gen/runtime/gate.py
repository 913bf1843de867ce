"""The layer's forget gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .init import Initialisation, draw_gate
from .mixer import Device, wide_dtype


class WideParameters(nn.Module):
    """A module whose own parameters are float32, or wider, whatever it is moved to, and whatever a checkpoint has."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast as any module, but to no dtype that is narrower than float32."""

        def kept(x: Tensor) -> Tensor:
            moved = fn(x)
            wide = wide_dtype(moved)
            return x.to(moved.device, wide) if moved.is_floating_point() and moved.dtype != wide else moved

        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load entries of a narrower dtype as float32, also where they are assigned."""
        for name, _ in self.named_parameters(recurse=False):
            if prefix + name in state_dict:
                found = state_dict[prefix + name]
                state_dict[prefix + name] = found.to(wide_dtype(found))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class DecayGate(WideParameters):
    """The parameters of the forget gate: A_log and dt_bias (Nf,).

    They are kept in float32, or wider, whatever dtype the module is made in or moved to, and whatever dtype a
    checkpoint has: between two bfloat16 values of A_log lie gates that differ in what they remember after a hundred
    tokens. FSDP's mixed precision casts what it gathers; ``sharding.fully_shard_decay`` keeps these out of that.
    """

    def __init__(
        self,
        heads: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
        init: Initialisation | None = None,
    ) -> None:
        super().__init__()
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.A_log = nn.Parameter(torch.empty(heads, device=device, dtype=wide))
        self.dt_bias = nn.Parameter(torch.empty(heads, device=device, dtype=wide))
        self.init = init or Initialisation()

    def reset_parameters(self) -> None:
        """Draw exp(A_log) uniform and softplus(dt_bias) log-uniform."""
        draw_gate(self.A_log, self.dt_bias, self.init)

    def forward(self, x: Tensor, in_kernel: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return f = exp(-exp(A_log) softplus(x + dt_bias)) of x (..., Nf) in float32 or wider.

        With ``in_kernel`` return x and copies of A_log and dt_bias in float32 or wider, for kernels that compute f;
        copies, since what wraps this module may take its parameters away after the call.
        """
        return forget_gate(self.A_log, self.dt_bias, x, in_kernel)


def forget_gate(A_log: Tensor, dt_bias: Tensor, x: Tensor, in_kernel: bool) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Do what ``DecayGate.forward`` does with these parameters."""
    if in_kernel:
        A_log, dt_bias = (p.to(wide_dtype(p), copy=True) for p in (A_log, dt_bias))
        return x, A_log, dt_bias
    dtype = wide_dtype(x)
    return torch.exp(-A_log.to(dtype).exp() * F.softplus(x.to(dtype) + dt_bias.to(dtype)))
