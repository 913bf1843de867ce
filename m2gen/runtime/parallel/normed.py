"""RMSNorm before a projection, as what it is after it: the scale of a token, which its projection's result may take.

So heads on other ranks are missed by one number a token alone, which sums over ranks as the projection's results do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..mixer import wide_dtype


@dataclass(frozen=True)
class Normed:
    """A norm of so many inputs a token."""

    size: int
    eps: float

    @staticmethod
    def squares(x: Tensor) -> Tensor:
        """Return the sums of the squares of x (..., C), (..., 1) in float32 or wider."""
        norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_dtype(x))
        return norms.square()

    def scale(self, squares: Tensor) -> Tensor:
        """Return the number that a token is multiplied by."""
        return torch.rsqrt(squares / self.size + self.eps)


class _Squared(torch.autograd.Function):
    """x as it is, and the sums of its squares, whose gradients meet in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x.view_as(x), Normed.squares(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, of_squares: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.addcmul(gradient, x, (2 * of_squares).to(x.dtype))


class _Scaled(torch.autograd.Function):
    """x times one number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, squares: Tensor, norm: Normed) -> Tensor:
        scale = norm.scale(squares)
        ctx.save_for_backward(x, scale)
        ctx.size = norm.size
        return scaled_by(x, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale = ctx.saved_tensors
        return *scaled_backward(gradient, x, scale, ctx.size), None


def scaled_backward(gradient: Tensor, x: Tensor, scale: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, of which ``gradient`` is that of ``scaled_by``, and of the squares."""
    of_scale = (gradient * x).sum(-1, keepdim=True, dtype=scale.dtype)
    return scaled_by(gradient, scale), of_scale * scale**3 * (-0.5 / size)


def scaled_by(x: Tensor, scale: Tensor) -> Tensor:
    """Return x times a wider ``scale``, rounded once to x's dtype, in one pass."""
    if torch.compiler.is_compiling():  # which makes one pass of this
        return (x * scale).to(x.dtype)
    return torch.mul(x, scale, out=torch.empty_like(x, memory_format=torch.contiguous_format))


_squared: Callable[[Tensor], tuple[Tensor, Tensor]] = _Squared.apply
_scaled: Callable[[Tensor, Tensor, Normed], Tensor] = _Scaled.apply


def squared(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (..., C), and the sums of its squares (..., 1) in float32 or wider."""
    return _squared(x)


def scaled(x: Tensor, squares: Tensor, norm: Normed) -> Tensor:
    """Return a projection's result x (..., H) normalised by the squares (..., 1) of the norm's inputs."""
    return _scaled(x, squares, norm)
