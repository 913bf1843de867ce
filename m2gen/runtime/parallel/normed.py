"""RMSNorm before a projection, as what it is after it: the scale of a token, which its projection's result may take.

So heads on other ranks are missed by one number a token alone, which sums over ranks as the projection's results do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..mixer import wide_dtype


class _Squared(torch.autograd.Function):
    """x as it is, and the sums of its squares, whose gradients meet in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_dtype(x))
        return x.view_as(x), norms.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, of_squares: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.addcmul(gradient, x, (2 * of_squares).to(x.dtype))


class _Scaled(torch.autograd.Function):
    """x times one number a token: rsqrt(squares / size + eps)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, squares: Tensor, size: int, eps: float) -> Tensor:
        scale = torch.rsqrt(squares / size + eps)
        ctx.save_for_backward(x, scale)
        ctx.size = size
        return _times(x, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale = ctx.saved_tensors
        of_scale = (gradient * x).sum(-1, keepdim=True, dtype=scale.dtype)
        return _times(gradient, scale), of_scale * scale**3 * (-0.5 / ctx.size), None, None


def _times(x: Tensor, scale: Tensor) -> Tensor:
    """Return x times a wider ``scale``, rounded once to x's dtype, in one pass."""
    if torch.compiler.is_compiling():  # which makes one pass of this
        return (x * scale).to(x.dtype)
    return torch.mul(x, scale, out=torch.empty_like(x, memory_format=torch.contiguous_format))


_squared: Callable[[Tensor], tuple[Tensor, Tensor]] = _Squared.apply
_scaled: Callable[[Tensor, Tensor, int, float], Tensor] = _Scaled.apply


def squared(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (..., C), and the sums of its squares (..., 1) in float32 or wider."""
    return _squared(x)


def scaled(x: Tensor, squares: Tensor, size: int, eps: float) -> Tensor:
    """Return a projection's result x (..., H) normalised by the squares (..., 1) of its ``size`` inputs a token."""
    return _scaled(x, squares, size, eps)
