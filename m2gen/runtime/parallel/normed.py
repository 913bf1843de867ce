"""RMSNorm before a projection, as what it is after it: the scale of a token, which its projection's result may take.

So heads on other ranks are missed by one number a token alone, which sums over ranks as the projection's results do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch, launches, layer_launches, layer_op
from ..fused import DTYPES
from ..layer_launches import LayerKernels
from ..mixer import Mixer, wide_dtype


@dataclass(frozen=True)
class Normed:
    """A norm of so many inputs a token."""

    size: int
    eps: float
    dims: tuple[int, ...] | None = None
    """What the layer's kernels are looked up by, which scale rows in one pass; None where PyTorch does."""

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
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, of_squares: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.addcmul(gradient, x, (2 * of_squares).to(x.dtype))


class _Scaled(torch.autograd.Function):
    """x times one number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, squares: Tensor, norm: Normed) -> Tensor:
        out, scale = scaled_rows(x, squares, norm)
        ctx.save_for_backward(x, scale)
        ctx.norm = norm
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale = ctx.saved_tensors
        return *scaled_backward(gradient, x, scale, ctx.norm), None


def dims_of(layer: Mixer) -> tuple[int, ...] | None:
    """Return what the kernels of a rank's layer are looked up by; None where it does not run them, or has none."""
    dims = (layer.state_expansion, layer.head_dim, *layer.heads)
    runs = layer.backend == "kernels" and getattr(layer, "fused", False)
    return dims if runs and dims[:6] in dispatch.LAYER_KERNELS else None


def scaled_rows(x: Tensor, squares: Tensor, norm: Normed) -> tuple[Tensor, Tensor]:
    """Return x (..., H) normalised by the squares (..., 1) of the norm's inputs, and the scale of each token."""
    kernels = _kernels(norm, x, squares)
    if kernels is None:
        scale = norm.scale(squares)
        return _times(x, scale), scale
    rows = (kernels, x.flatten(0, -2), squares.flatten(0, -2), norm.size, norm.eps)
    out, scale = launches.on_device(layer_launches.scale, x.get_device(), rows)
    return out.view(x.shape), scale.view(squares.shape)


def scaled_backward(gradient: Tensor, x: Tensor, scale: Tensor, norm: Normed) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, of which ``gradient`` is that of ``scaled_rows``, and of the squares."""
    kernels = _kernels(norm, gradient, x, scale)
    if kernels is None:
        of_scale = (gradient * x).sum(-1, keepdim=True, dtype=scale.dtype)
        return _times(gradient, scale), of_scale * scale**3 * (-0.5 / norm.size)
    rows = (kernels, gradient.flatten(0, -2), x.flatten(0, -2), scale.flatten(0, -2), norm.size)
    dx, dsquares = launches.on_device(layer_launches.scale_backward, x.get_device(), rows)
    return dx.view(x.shape), dsquares.view(scale.shape)


def _kernels(norm: Normed, *operands: Tensor) -> LayerKernels | None:
    """Return the kernels for rows in order, in dtypes that they have; compilers need none."""
    if norm.dims is None or torch.compiler.is_compiling():
        return None
    if not all(type(x) is Tensor and x.is_contiguous() and x.dtype in DTYPES for x in operands):
        return None
    call = layer_op.call_like(operands, ("scale", norm))
    if call.kernels is None:
        call.kernels = dispatch.layer_kernels(norm.dims, operands[0])
    return LayerKernels(call.kernels, call.launches)


def _times(x: Tensor, scale: Tensor) -> Tensor:
    """Return x times a wider ``scale``, rounded once to x's dtype, in one pass."""
    if torch.compiler.is_compiling():
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
