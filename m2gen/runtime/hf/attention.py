"""Softmax attention as the published hybrid models have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..mixer import wide_dtype
from .blocks import AttentionBlock
from .configuration import M2RNNConfig
from .initialise import deep


class SoftmaxAttention(nn.Module):
    """Causal attention whose one projection gives, for each key, its queries, itself, its value, and gates."""

    is_causal = True

    def __init__(self, config: M2RNNConfig, block: AttentionBlock, number: int) -> None:
        super().__init__()
        self.config, self.block, self.layer_idx = config, block, number
        self.num_key_value_groups = block.groups  # where transformers' attention functions look for it
        width = block.heads * block.head_dim
        fused = (1 + block.gate) * width + 2 * block.kv_heads * block.head_dim
        self.c_attn = nn.Linear(config.hidden_size, fused, bias=block.bias)
        self.c_proj = deep(nn.Linear(width, config.hidden_size, bias=block.bias))

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what x (B, S, hidden_size) attends to, and the scores where the implementation gives them."""
        block = self.block
        queries = block.groups * block.head_dim
        sizes = [queries, block.head_dim, block.head_dim, *([queries] if block.gate else [])]
        parts = torch.split(self.c_attn(x).unflatten(-1, (block.kv_heads, -1)), sizes, -1)
        q = parts[0].reshape(*x.shape[:-1], block.heads, block.head_dim).transpose(1, 2)
        k, value = (part.transpose(1, 2) for part in parts[1:3])
        if position_embeddings is not None:
            q, k = rotated(q, *position_embeddings), rotated(k, *position_embeddings)
        keys, values = (k, value) if cache is None else cache.update(k, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        dropout = block.score_dropout if self.training else 0.0
        y, scores = attend(
            self, q, keys, values, attention_mask, dropout=dropout, scaling=block.scale, **kwargs
        )  # y is (B, S, heads, head_dim)
        if block.exclusive:
            y = without_own(y, value.transpose(1, 2))
        if block.gate:
            y = y * parts[3].reshape(y.shape).sigmoid()
        return F.dropout(self.c_proj(y.flatten(-2)), block.dropout, self.training), scores


def eager(
    module: SoftmaxAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attend with every score in memory; the mask (B, 1, S, keys) is added to scores."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, -1, dtype=wide_dtype(scores)).to(query.dtype)
    return (F.dropout(weights, dropout, module.training) @ value).transpose(1, 2).contiguous(), weights


def without_own(y: Tensor, value: Tensor) -> Tensor:
    """Remove from y (B, S, heads, head_dim) its projection on each token's own value (B, S, kv heads, head_dim).

    Nothing is along a value of zeros, which inputs of zeros have, as padding that is given as embeddings.
    """
    value = value.repeat_interleave(y.shape[-2] // value.shape[-2], -2).to(wide_dtype(value))
    least = torch.finfo(value.dtype).tiny
    along = (y * value).sum(-1, keepdim=True) / value.square().sum(-1, keepdim=True).clamp(min=least)
    return (y - along * value).to(y.dtype)


def rotations(positions: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (B, S, size) of positions (B, S), in float32, the second half as the first."""
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last dims of x (B, heads, S, head_dim), as many as there are cosines (B, S, size)."""
    still, turned = torch.split(x, [x.shape[-1] - cos.shape[-1], cos.shape[-1]], -1)
    one, other = turned.to(wide_dtype(x)).chunk(2, -1)
    turned = torch.cat((one, other), -1) * cos[:, None] + torch.cat((-other, one), -1) * sin[:, None]
    return torch.cat((still, turned.to(x.dtype)), -1)
