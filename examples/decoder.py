"""A small decoder whose layers each have a mixer of their own kind: what both of the larger examples train."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from gated_delta import GatedDelta
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the generated packages lie there

KINDS = ("m2rnn", "attention", "linear", "gru", "gated_deltanet", "gated_deltanet_fla")
UNCOMPILED = ("gru", "gated_deltanet_fla")
"""Kinds that torch does not compile to one graph."""
DELTA_ROWS = 128
"""Rows of a Gated DeltaNet head, which has twice the columns: those of all heads are as many as the model's."""


def package_of(name: str) -> ModuleType:
    """Import a generated package, or end with what to build."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{name} must be a generated package, got none ({error}); build one with m2gen build"
        ) from None


def layer_of(package: ModuleType, name: str, width: int, **options: object) -> nn.Module:
    """Return an M2RNN layer of a package, or end with what is wrong with its name or its options."""
    try:
        return package.M2RNN.from_variant(name, width, **options)
    except ValueError as error:
        raise SystemExit(str(error)) from None


class Attention(nn.Module):
    """Causal attention with rotary positions, so that it can be asked about lengths that it never saw."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % (2 * heads):
            raise SystemExit(f"width must be a multiple of {2 * heads}, two channels of {heads} heads, got {width}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


def rotated(x: Tensor) -> Tensor:
    """Turn pairs of channels of x (B, heads, S, dim) by angles that grow with the position."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, other = x[..., :half], x[..., half:]
    return torch.cat((one * cos - other * sin, one * sin + other * cos), -1)


class Linear(nn.Module):
    """The M2RNN layer with H_t = f_t H_(t-1) + (1 - f_t) k_t v_t^T: neither the tanh nor the state weight."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        layer.state_weight.requires_grad_(False)  # nothing reads it

    def forward(self, x: Tensor) -> Tensor:
        layer, heads = self.layer, self.layer.heads
        rows, cols = layer.state_expansion, layer.head_dim
        sizes = [heads.q * rows, heads.k * rows, heads.v * cols]
        mixed, f, g = layer.input_projection(x).split([sum(sizes), heads.f, layer.gate_heads * cols], -1)
        if layer.conv1d is not None:
            mixed = layer.conv1d(F.pad(mixed.mT, (layer.conv_width - 1, 0))).mT
        if layer.activation == "silu":
            mixed = F.silu(mixed)
        q, k, v = (
            part.unflatten(-1, (count, -1)).repeat_interleave(layer.total_heads // count, -2).transpose(1, 2)
            for part, count in zip(mixed.split(sizes, -1), heads, strict=False)
        )
        forget = layer.decay_gate(f).repeat_interleave(layer.total_heads // heads.f, -1).mT  # (B, N, S)
        decay = forget.clamp(min=1e-30).log().cumsum(-1)
        kept = (decay[..., :, None] - decay[..., None, :]).masked_fill(
            torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1), float("-inf")
        )
        scores = (q @ k.mT) * (kept.exp() * (1 - forget)[..., None, :]).to(q.dtype)
        y = (scores @ v).transpose(1, 2) + layer.D.to(q.dtype) * v.transpose(1, 2)
        g = g.unflatten(-1, (layer.gate_heads, cols)).repeat_interleave(layer.total_heads // layer.gate_heads, -2)
        return layer.output_projection(layer.g_norm((y * F.silu(g)).flatten(-2)))


class Gru(nn.Module):
    """torch's GRU, which is cuDNN's on a GPU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class FlaGatedDeltaNet(nn.Module):
    """flash-linear-attention's layer, where that package is installed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from tools.gated_deltanet import layer

        try:
            self.layer = layer(width, DELTA_ROWS)
        except ImportError as error:
            raise SystemExit(
                f"gated_deltanet_fla must have flash-linear-attention installed, got none ({error})"
            ) from None
        except ValueError as error:  # a width that no number of heads makes
            raise SystemExit(f"gated_deltanet_fla: {error}") from None

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def gated_delta(width: int) -> GatedDelta:
    """Return Gated DeltaNet in plain PyTorch, with the heads that flash-linear-attention's has here."""
    heads, rest = divmod(width, 2 * DELTA_ROWS)
    if rest or not heads:
        raise SystemExit(f"width must be a multiple of {2 * DELTA_ROWS} for gated_deltanet, got {width}")
    return GatedDelta(width, heads, DELTA_ROWS, 2 * DELTA_ROWS)


def mixer(kind: str, width: int, heads: int, package: ModuleType, layer: str, **options: object) -> nn.Module:
    """Return a mixer of one of ``KINDS``; ``layer`` is the M2RNN layer's name in the package, options are its own."""
    if kind == "m2rnn":
        return layer_of(package, layer, width, **options)
    if kind == "linear":
        return Linear(layer_of(package, layer, width, **options))
    if kind == "gru":
        return Gru(width)
    if kind == "gated_deltanet":
        return gated_delta(width)
    if kind == "gated_deltanet_fla":
        return FlaGatedDeltaNet(width)
    if kind == "attention":
        return Attention(width, heads)
    raise SystemExit(f"mixers must be of {', '.join(KINDS)}, got {kind!r}")


class Block(nn.Module):
    """A mixer and an MLP, each on a normalised input and added to it."""

    def __init__(self, mixer: nn.Module, width: int, hidden: int) -> None:
        super().__init__()
        self.before_mixer, self.before_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.mixer = mixer
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.before_mixer(x))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class Decoder(nn.Module):
    """Tokens (B, S) to logits (B, S, classes); ``hidden`` has the width of each MLP, four times the model's if None."""

    def __init__(
        self, mixers: Sequence[nn.Module], width: int, tokens: int, classes: int, hidden: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        nn.init.normal_(self.embed.weight, std=0.5)
        self.blocks = nn.ModuleList(
            Block(mixer, width, inner) for mixer, inner in zip(mixers, hidden or [4 * width] * len(mixers), strict=True)
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, classes, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def groups_of(model: nn.Module, decay: float) -> list[dict[str, object]]:
    """Return an optimizer's groups: weight decay for matrices, none for gates, D, norms and biases."""
    plain = ("A_log", "dt_bias", ".D", "norm", "bias", "before_")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    free = [p for name, p in named if any(part in name for part in plain)]
    rest = [p for name, p in named if not any(part in name for part in plain)]
    return [{"params": rest, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]
