"""An adapter of ``m2gen bench --layers`` for flash-linear-attention's GatedDeltaNet, which is needed for nothing else.

    pip install flash-linear-attention
    m2gen bench --spec h200.yaml --layers --peer-layer tools.gated_deltanet:gated_deltanet

Heads have K256 V512, and there is one for every 512 channels of the model: 3 at hidden 1536, as published with the 7B
M2RNN. The package refuses the backward on Hopper with Triton 3.4.0 to 3.7.0, which miscompile it; ``--timing-only``
passes that guard, and what is timed is marked.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2gen.bench.layers.subject import Decoder, LayerShape, LayerSubject

ROWS, EXPANSION = 256, 2
"""K, and V as a multiple of it."""
GUARD = "Triton 3.4.0 to 3.7.0 miscompiles the backward on Hopper; flash-linear-attention's refusal was passed"


def layer(hidden: int, rows: int = ROWS, **options: Any) -> nn.Module:
    """Return a GatedDeltaNet with heads of ``rows`` rows and twice the columns, as many as make hidden columns.

    Raises ImportError without the package, ValueError where no number of heads does.
    """
    from fla.layers import GatedDeltaNet

    from tools import parallel_autotune

    parallel_autotune.install()
    heads, rest = divmod(hidden, EXPANSION * rows)
    if rest or not heads:
        raise ValueError(f"hidden must be a multiple of {EXPANSION * rows} for heads of {rows} rows, got {hidden}")
    made: nn.Module = GatedDeltaNet(
        hidden_size=hidden, expand_v=EXPANSION, head_dim=rows, num_heads=heads, layer_idx=0, **options
    )
    return made


def pass_guard() -> str:
    """Let the backward run where the package refuses it; return why it did, or nothing where it does not."""
    module = importlib.import_module("fla.ops.common.chunk_o")
    refuses = module.IS_NVIDIA_HOPPER and module.TRITON_ABOVE_3_4_0 and not module.TRITON_ABOVE_3_7_1
    if not refuses and module.__dict__.get("m2gen_passed") is None:
        return ""
    module.TRITON_ABOVE_3_7_1 = True
    module.m2gen_passed = GUARD  # a second layer of this process is as wrong as the first
    return GUARD


def gated_deltanet(shape: LayerShape) -> LayerSubject | None:
    """Return the layer for the width of a model, or None for one that no number of heads fits."""
    if shape.hidden % (EXPANSION * ROWS):
        return None
    module = layer(shape.hidden).to(shape.device, shape.dtype)
    guard = pass_guard() if shape.timing_only else ""
    packages = ("flash-linear-attention", "fla-core")

    def decoder(batch: int, before: int) -> Decoder:
        module.eval()  # the kernels of single tokens are for evaluation alone
        states = States()
        return Decoder(lambda x: module(x, past_key_values=states, use_cache=True)[0], states.traffic)

    return LayerSubject(module, lambda x: module(x)[0], Plain(module), decoder, packages, guard)


class States:
    """The states of one layer as it asks for them, moved on in place so that a captured token goes on from them."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    def __len__(self) -> int:
        return 1 if self._held else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._held

    def update(self, *, layer_idx: int, recurrent_state: Tensor, conv_state: tuple[Tensor, ...], **_: Any) -> None:
        """Take the states after a call."""
        if not self._held:
            self._held = {
                "recurrent_state": recurrent_state.clone(),
                "conv_state": tuple(x.clone() for x in conv_state),
            }
            return
        given = (recurrent_state, *conv_state)
        for ours, new in zip((self._held["recurrent_state"], *self._held["conv_state"]), given, strict=True):
            if ours.data_ptr() != new.data_ptr():
                ours.copy_(new)

    def traffic(self) -> int:
        """Return the bytes of the states, each read and written."""
        states = (self._held["recurrent_state"], *self._held["conv_state"])
        return 2 * sum(x.numel() * x.element_size() for x in states)


class Plain:
    """The layer in plain PyTorch, one token after the other: operands rounded to x's dtype, the state wide."""

    def __init__(self, module: nn.Module) -> None:
        self.rows, self.columns = int(module.head_k_dim), int(module.head_v_dim)  # type: ignore[arg-type]
        self.eps = float(module.o_norm.eps)  # type: ignore[union-attr, arg-type]

    def __call__(self, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        q, k, v = (self._convolved(p, x, name) for name in "qkv")
        q, k = (_normalised(part.unflatten(-1, (-1, self.rows)).to(wide)) for part in (q, k))
        q, k = (q * self.rows**-0.5).to(x.dtype).to(wide), k.to(x.dtype).to(wide)
        v = v.unflatten(-1, (-1, self.columns)).to(wide)
        beta = F.linear(x, p["b_proj.weight"]).to(wide).sigmoid()
        step = F.softplus(F.linear(x, p["a_proj.weight"]).to(wide) + p["dt_bias"].to(wide))
        decay = (-p["A_log"].to(wide).exp() * step).exp()
        state = x.new_zeros(x.shape[0], v.shape[2], self.rows, self.columns, dtype=wide)
        outputs = []
        for t in range(x.shape[1]):
            state = state * decay[:, t, :, None, None]
            missing = v[:, t] - (k[:, t, :, None] @ state).squeeze(-2)
            state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * missing)[:, :, None]
            outputs.append((q[:, t, :, None] @ state).squeeze(-2))
        y = torch.stack(outputs, 1).to(x.dtype).to(wide)
        gate = F.linear(x, p["g_proj.weight"]).unflatten(-1, (-1, self.columns)).to(wide)
        y = y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt() * p["o_norm.weight"].to(wide) * F.silu(gate)
        return F.linear(y.to(x.dtype).flatten(-2), p["o_proj.weight"])

    def _convolved(self, p: Mapping[str, Tensor], x: Tensor, name: str) -> Tensor:
        projected = F.linear(x, p[f"{name}_proj.weight"])
        taps = p[f"{name}_conv1d.weight"]
        padded = F.pad(projected.mT, (taps.shape[-1] - 1, 0))
        return F.silu(F.conv1d(padded, taps, groups=taps.shape[0])).mT


def _normalised(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
