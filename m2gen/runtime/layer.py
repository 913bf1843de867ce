"""The M2RNN layer of arXiv 2603.14360: projections, convolution and gate around the operator."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import built
from .block_config import layer_arguments
from .cache import NUMBERS, M2RNNCache, States, allocate_cache
from .convolution import DepthwiseConv1d
from .facts import Backend, HeadCounts
from .forward import run
from .fused import TENSORS
from .gate import DecayGate
from .init import Initialisation, draw
from .layer_config import LayerConfig, Norm, heads_of
from .mixer import Device, operand_sizes, split_sizes
from .norm import make_norm
from .not_built import check_built, first
from .optimizer import mark_no_weight_decay
from .room import leave_room, without_room

__all__ = ["M2RNN", "M2RNNCache"]


class M2RNN(nn.Module):
    """A mixer of tokens: x (B, S, hidden_size) to the same shape.

    One projection gives q, k, v, the forget gate's input and the output gate g. q, k and v pass a depthwise causal
    convolution and SiLU; the operator runs with the gate exp(-exp(A_log) softplus(f + dt_bias)); the result is the
    output projection of RMSNorm((y + D v) silu(g)). K is ``state_expansion``, V ``head_dim``.

    ``heads`` gives the heads of q, k, v, f and w, and optionally of g, as a spec does: ``{"q": 1, ...}``. Operand x of
    head n is its group n // (N // Nx), N being the most heads of q, k, v, f and w; without "g" there are N of g.

    ``bias`` is that of the input projection and the convolution. ``conv_width=None`` leaves the convolution out,
    ``residual=False`` D v; ``activation`` is one of ``ACTIVATIONS`` or None, ``norm`` rmsnorm, layernorm or None.
    ``forget_inputs`` is how many values the projection gives the heads of f to share, one each if None. ``round_gate``
    rounds the gate to the activations' dtype, as the released models did, so it needs variants with ``gate: given``.
    ``init`` says how parameters are drawn. ``clip`` and ``backend`` are ``m2rnn``'s. ``fused`` lets kernels of the
    layer's own do between the projections what its modules would, where these are as the layer made them and nothing
    watches their calls: several times faster, and rounded once where modules round each result.

    A_log and dt_bias stay in float32, or wider, whatever the layer's dtype. Parameters may be made on the meta device:
    ``to_empty`` and ``reset_parameters`` make them real. dtypes other than the built ones are an error of the first
    call, since autocast and ``to`` may change them.

    Raises VariantNotBuiltError, with the spec lines to add, where no kernels serve these dims and heads; ValueError
    for heads that do not divide N, and for options that no layer has.
    """

    D: nn.Parameter | None
    plain_children: ClassVar[Mapping[str, type[nn.Module]]] = {
        "conv1d": DepthwiseConv1d, "decay_gate": DecayGate,
    }  # fmt: skip
    """Classes of the children whose work the layer's kernels do, beside that of projections and the norm."""
    parameter_kinds: ClassVar[tuple[type, ...]] = TENSORS
    """Classes that its parameters have where they are all there."""

    def __init__(
        self,
        hidden_size: int,
        state_expansion: int,
        head_dim: int,
        heads: Mapping[str, int],
        *,
        conv_width: int | None = 4,
        activation: str | None = "silu",
        norm: Norm | None = "rmsnorm",
        norm_eps: float = 1e-5,
        residual: bool = True,
        bias: bool = False,
        forget_inputs: int | None = None,
        round_gate: bool = False,
        init: Initialisation | None = None,
        clip: float | None = 1.0,
        backend: Backend = "kernels",
        fused: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        counts, gate_heads = heads_of(heads)
        config = LayerConfig(
            hidden_size, state_expansion, head_dim, counts, gate_heads,
            counts.f if forget_inputs is None else forget_inputs,
            conv_width, activation, norm, norm_eps, residual, bias, clip, round_gate, init or Initialisation(),
        )  # fmt: skip
        if backend not in ("kernels", "reference"):
            raise ValueError(f"M2RNN: backend must be kernels or reference, got {backend!r}")
        if backend == "kernels":
            check_built(state_expansion, head_dim, counts, dtype)
        self.backend: Backend = backend
        self.fused = fused
        self.number = next(NUMBERS)  # by which caches know their layer
        self._take(config)
        self._make_children(config, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def _take(self, config: LayerConfig) -> None:
        """Set the attributes that a ``Mixer`` has."""
        self.heads, self.total_heads, self.gate_heads = config.heads, config.total_heads, config.gate_heads
        self.hidden_size, self.state_expansion, self.head_dim = (
            config.hidden_size, config.state_expansion, config.head_dim
        )  # fmt: skip
        self.forget_inputs, self.conv_width, self.clip = config.forget_inputs, config.conv_width, config.clip
        self.activation, self.round_gate, self.init = config.activation, config.round_gate, config.init

    def _make_children(self, config: LayerConfig, made: dict[str, Any]) -> None:
        inner = config.total_heads * config.head_dim
        self.input_projection = nn.Linear(config.hidden_size, sum(split_sizes(self)), bias=config.bias, **made)
        channels, width = sum(operand_sizes(self)), config.conv_width
        self.conv1d = (
            None if width is None
            else DepthwiseConv1d(channels, channels, width, groups=channels, bias=config.bias, **made)
        )  # fmt: skip
        self.decay_gate = DecayGate(config.heads.f, init=config.init, **made)
        self.state_weight = nn.Parameter(torch.empty(config.heads.w, config.head_dim, config.head_dim, **made))
        skip = nn.Parameter(torch.empty(config.total_heads, config.head_dim, **made)) if config.residual else None
        self.register_parameter("D", skip)
        self.g_norm = make_norm(config.norm, inner, config.norm_eps, **made)
        self.output_projection = nn.Linear(inner, config.hidden_size, bias=False, **made)
        _settle(self)
        self.register_load_state_dict_post_hook(partial(_settle, moved=False))  # type: ignore[no-untyped-call]
        self.register_state_dict_post_hook(without_room)  # type: ignore[no-untyped-call]

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

    @classmethod
    def from_config(
        cls,
        block: Mapping[str, Any],
        hidden_size: int,
        *,
        backend: Backend = "kernels",
        device: Device = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> M2RNN:
        """Return the layer that a published block's configuration describes, with its ``state_dict`` and results.

        ``block`` has the keys of an entry of ``sequence_mixer_blocks`` whose type is m2rnn. ``options`` are the
        constructor's, and go before what the block says; of ``init``, the block says the ranges of A_log and dt_bias.

        Raises ValueError, naming the key, for a block that the published implementation cannot run either.
        """
        arguments = layer_arguments(block, options.pop("init", None)) | options
        return cls(hidden_size, **arguments, backend=backend, device=device, dtype=dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> M2RNN:
        """Move and cast as any module, and settle parameters that are new thereafter."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _settle(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy, or of a pickle, and settle parameters, whose copies have no marks."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _settle(self)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as ``init`` says: by default projections are normal with fan-in**-0.5."""
        draw(self, self.init)

    def forward(
        self,
        x: Tensor,
        cache: M2RNNCache | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> Tensor:
        """Mix x (B, S, hidden_size), or a packed batch (T, hidden_size) with cu_seqlens (B + 1,) as ``m2rnn`` takes it,
        and cu_seqlens_cpu, a copy of that on the CPU, with which nothing waits for the device.

        attention_mask (B, S) is true, or not 0, at tokens: others have no part in anything, and their results are 0.
        Packing them waits for the device; pass cu_seqlens where that matters.

        cache (``allocate_cache``) holds where B sequences are: the call goes on from there, and moves it on in place.
        One token each (S = 1) is a step of decoding, for which kernels pack nothing. A sequence without a token in the
        mask stays where it is. A call that fails leaves the cache as it was.

        Raises ValueError, TypeError or RuntimeError for a cache of other sequences, dims, dtypes or another device or
        layer, or whose elements share memory; RuntimeError for one where gradients are wanted: ``scan`` is the call
        whose states have gradients.
        """
        return run(self, x, cache, attention_mask, cu_seqlens, cu_seqlens_cpu)

    def scan(
        self,
        x: Tensor,
        conv: Tensor | None = None,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the result and the states after it: what was convolved last, and the operator's state.

        x as in ``forward``; conv (B, conv_width - 1, C) in x's dtype with C = Nq K + Nk K + Nv V, and state
        (B, N, K, V) in float32, both zeros if None. Everything is differentiable. It goes through ``forward``'s hooks.
        """
        after: tuple[Tensor, Tensor, Tensor] = self(x, States(conv, state), None, cu_seqlens, cu_seqlens_cpu)
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


def _settle(layer: nn.Module, *_: Any, moved: bool = True) -> None:
    """Give parameters, which may be new, what no state dict holds: marks, and room for aligned products."""
    mark_no_weight_decay(layer)
    if type(projection := layer.input_projection) is nn.Linear:
        leave_room(projection, moved)
