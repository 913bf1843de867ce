"""The M2RNN layer of arXiv 2603.14360: projections, convolution and gate around the operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from . import built
from .cache import NUMBERS, M2RNNCache, States, allocate_cache
from .convolution import DepthwiseConv1d
from .facts import Backend, HeadCounts
from .forward import run
from .gate import DecayGate
from .mixer import Device, operand_sizes, split_sizes
from .norm import RMSNorm
from .not_built import check_built, first

__all__ = ["M2RNN", "M2RNNCache"]


class M2RNN(nn.Module):
    """A mixer of tokens: x (B, S, hidden_size) to the same shape.

    One projection gives q, k, v, the forget gate's input and the output gate g. q, k and v pass a depthwise causal
    convolution and SiLU; the operator runs with the gate exp(-exp(A_log) softplus(f + dt_bias)); the result is the
    output projection of RMSNorm((y + D v) silu(g)). K is ``state_expansion``, V ``head_dim``.

    ``heads`` gives the heads of q, k, v, f and w, and optionally of g, as a spec does: ``{"q": 1, ...}``. Operand x of
    head n is its group n // (N // Nx), N being the most heads of q, k, v, f and w; without "g" there are N of g.

    ``bias`` is that of the input projection and the convolution. ``clip`` and ``backend`` are ``m2rnn``'s.

    Parameters may be made on the meta device: ``to_empty`` and ``reset_parameters`` make them real. dtypes other than
    the built ones are an error of the first call, since autocast and ``to`` may change them.

    Raises VariantNotBuiltError, with the spec lines to add, where no kernels serve these dims and heads; ValueError
    for heads that do not divide N.
    """

    def __init__(
        self,
        hidden_size: int,
        state_expansion: int,
        head_dim: int,
        heads: Mapping[str, int],
        *,
        conv_width: int = 4,
        bias: bool = False,
        clip: float | None = 1.0,
        norm_eps: float = 1e-5,
        backend: Backend = "kernels",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = dict(heads)
        gate_heads = groups.pop("g", None)
        if set(groups) != set(HeadCounts._fields):
            raise ValueError(f"M2RNN: heads must be of q, k, v, f, w and optionally g, got {', '.join(heads)}")
        self.heads = HeadCounts(**groups)
        self.total_heads = max(self.heads)
        self.gate_heads = self.total_heads if gate_heads is None else gate_heads
        for name, count in (*groups.items(), ("g", self.gate_heads)):
            if count < 1 or self.total_heads % count:
                raise ValueError(f"M2RNN: heads of {name} must divide {self.total_heads}, got {count}")
        if conv_width < 1:
            raise ValueError(f"M2RNN: conv_width must be at least 1, got {conv_width}")
        if backend not in ("kernels", "reference"):
            raise ValueError(f"M2RNN: backend must be kernels or reference, got {backend!r}")
        if backend == "kernels":
            check_built(state_expansion, head_dim, self.heads, dtype)
        self.hidden_size, self.state_expansion, self.head_dim = hidden_size, state_expansion, head_dim
        self.conv_width, self.clip = conv_width, clip
        self.backend: Backend = backend
        self.number = next(NUMBERS)  # by which caches know their layer
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = self.total_heads * head_dim
        self.input_projection = nn.Linear(hidden_size, sum(split_sizes(self)), bias=bias, **made)
        channels = sum(operand_sizes(self))
        self.conv1d = DepthwiseConv1d(channels, channels, conv_width, groups=channels, bias=bias, **made)
        self.decay_gate = DecayGate(self.heads.f, **made)
        self.state_weight = nn.Parameter(torch.empty(self.heads.w, head_dim, head_dim, **made))
        self.D = nn.Parameter(torch.empty(self.total_heads, head_dim, **made))
        self.g_norm = RMSNorm(inner, norm_eps, **made)
        self.output_projection = nn.Linear(inner, hidden_size, bias=False, **made)
        self.reset_parameters()

    @classmethod
    def from_variant(cls, name: str, hidden_size: int, *, gate_heads: int | None = None, **options: Any) -> M2RNN:
        """Return a layer with the dims and heads of a layer of the spec, or of a variant by its key.

        ``options`` are the constructor's. Raises ValueError for a name that is neither, or a layer that is a grid.
        """
        points = built.LAYERS.get(name) or tuple(key[:3] for key, variant in built.VARIANTS.items() if variant == name)
        if not points:
            raise ValueError(
                f"M2RNN: name must be a layer ({first(built.LAYERS)}) or the key of a built variant, got {name!r}"
            )
        if len(points) > 1:
            keys = first(dict.fromkeys(variant for key, variant in built.VARIANTS.items() if key[:3] in points))
            raise ValueError(f"M2RNN: {name} is a grid; name one of its variants: {keys}")
        rows, cols, heads = points[0]
        groups = dict(zip(HeadCounts._fields, heads, strict=True)) | ({} if gate_heads is None else {"g": gate_heads})
        return cls(hidden_size, rows, cols, groups, **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter anew: the state weight is the identity, D one, projections normal with fan-in**-0.5."""
        for projection in (self.input_projection, self.output_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        self.conv1d.reset_parameters()
        self.decay_gate.reset_parameters()
        self.g_norm.reset_parameters()
        nn.init.ones_(self.D)
        eye = torch.eye(self.head_dim, device=self.state_weight.device, dtype=self.state_weight.dtype)
        _assign(self.state_weight, eye.expand(self.state_weight.shape).contiguous())

    def forward(
        self,
        x: Tensor,
        cache: M2RNNCache | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mix x (B, S, hidden_size), or a packed batch (T, hidden_size) with cu_seqlens (B + 1,) as ``m2rnn`` takes it.

        attention_mask (B, S) is true, or not 0, at tokens: others have no part in anything, and their results are 0.
        Packing them waits for the device; pass cu_seqlens where that matters.

        cache (``allocate_cache``) holds where B sequences are: the call goes on from there, and moves it on in place.
        One token each (S = 1) is a step of decoding, for which kernels pack nothing. A sequence without a token in the
        mask stays where it is. A call that fails leaves the cache as it was.

        Raises ValueError, TypeError or RuntimeError for a cache of other sequences, dims, dtypes or another device or
        layer, or whose elements share memory; RuntimeError for one where gradients are wanted: ``scan`` is the call
        whose states have gradients.
        """
        return run(self, x, cache, attention_mask, cu_seqlens)

    def scan(
        self,
        x: Tensor,
        conv: Tensor | None = None,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the result and the states after it: what was convolved last, and the operator's state.

        x as in ``forward``; conv (B, conv_width - 1, C) in x's dtype with C = Nq K + Nk K + Nv V, and state
        (B, N, K, V) in float32, both zeros if None. Everything is differentiable. It goes through ``forward``'s hooks.
        """
        after: tuple[Tensor, Tensor, Tensor] = self(x, States(conv, state), None, cu_seqlens)
        return after

    def allocate_cache(
        self,
        batch_size: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> M2RNNCache:
        """Return the cache of sequences that have not begun.

        device is the parameters' if None; it must be given where all of them are elsewhere between calls (offloaded).
        dtype is the convolution's, its parameters' if None; state_dtype is float32 if None (float64 for parameters in
        that), or bfloat16, which halves memory and loses what ``m2rnn_step`` says. Raises TypeError for any other.
        """
        return allocate_cache(self, batch_size, device, dtype, state_dtype)

    def extra_repr(self) -> str:
        """Say the dims and heads in ``repr``."""
        counts = self.heads._asdict() | {"g": self.gate_heads}
        groups = ", ".join(f"{name}={count}" for name, count in counts.items())
        dims = f"{self.hidden_size}, K={self.state_expansion}, V={self.head_dim}, heads: {groups}"
        return f"{dims}, conv_width={self.conv_width}, clip={self.clip}, backend={self.backend}"


def _assign(parameter: Tensor, value: Tensor) -> None:
    """Copy ``value``, the same on every rank, to a parameter that may be sharded over ranks."""
    if distributed.is_available():
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)
