"""The layer's forward for any module with its parts: with or without a cache, a mask, offsets."""

from __future__ import annotations

from typing import cast, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from .cache import M2RNNCache, States, check_cache, commit
from .decode import step
from .mixer import Mixer, wants_gradients
from .offsets import check_host_offsets
from .scan import scan


@overload
def run(
    layer: Mixer,
    x: Tensor,
    cache: M2RNNCache | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Tensor: ...


@overload
def run(
    layer: Mixer,
    x: Tensor,
    cache: States,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...


def run(
    layer: Mixer,
    x: Tensor,
    cache: M2RNNCache | States | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Do what ``M2RNN.forward`` does, of any module with the attributes of an ``M2RNN``; for ``States``, ``scan``."""
    check_tokens(layer, x, cu_seqlens, cu_seqlens_cpu)
    if cache is None:
        if attention_mask is not None:
            return _padded(layer, x, None, None, attention_mask, cu_seqlens)[0]
        return scan(layer, x, None, None, cu_seqlens, cu_seqlens_cpu)[0]
    if not getattr(cache, "in_place", True):  # no isinstance: the states may be of another package's layer
        if attention_mask is not None:
            return _padded(layer, x, cache.conv, cache.state, attention_mask, cu_seqlens)
        return scan(layer, x, cache.conv, cache.state, cu_seqlens, cu_seqlens_cpu)
    moved = cast(M2RNNCache, cache)
    if wants_gradients(layer, x):
        raise RuntimeError("M2RNN: a cache has no gradients; call under torch.no_grad(), or use scan")
    check_cache(layer, moved, x, cu_seqlens)
    if cu_seqlens is None and x.shape[1] == 1 and layer.backend == "kernels":
        mask = None if attention_mask is None else _mask(attention_mask, x)[:, 0]
        return step(layer, x[:, 0], moved, mask)[:, None]
    if attention_mask is not None:
        y, conv, state = _padded(layer, x, moved.conv, moved.state, attention_mask, cu_seqlens)
    else:
        y, conv, state = scan(layer, x, moved.conv, moved.state, cu_seqlens, cu_seqlens_cpu)
    commit(moved, conv, state)
    return y


def check_tokens(layer: Mixer, x: Tensor, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None) -> None:
    """Raise ValueError or TypeError unless x has a batch's shape, or a packed one's, and the offsets may be its own."""
    lead = ("B", "S") if cu_seqlens is None else ("T",)
    if x.dim() != len(lead) + 1 or x.shape[-1] != layer.hidden_size:
        expected = ", ".join((*lead, str(layer.hidden_size)))
        raise ValueError(f"M2RNN: x must be ({expected}), got {tuple(x.shape)}")
    check_host_offsets(cu_seqlens, cu_seqlens_cpu)


def _padded(
    layer: Mixer,
    x: Tensor,
    conv: Tensor | None,
    state: Tensor | None,
    attention_mask: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the tokens of a padded batch as a packed one, and put the results back."""
    if cu_seqlens is not None:
        raise ValueError("M2RNN: attention_mask and cu_seqlens must not be given together")
    mask = _mask(attention_mask, x)
    offsets = F.pad(mask.sum(1).cumsum(0), (1, 0))
    # without data every token is there: results have the same shapes whatever the mask holds
    tokens = torch.arange(mask.numel(), device="meta") if mask.is_meta else mask.flatten().nonzero().squeeze(-1)
    y, conv, state = scan(layer, x.flatten(0, 1)[tokens], conv, state, offsets)
    flat = y.new_zeros(mask.numel(), y.shape[-1]).index_copy(0, tokens, y)
    return torch.unflatten(flat, 0, mask.shape), conv, state


def _mask(attention_mask: Tensor, x: Tensor) -> Tensor:
    """Return where x (B, S, hidden_size) has tokens, as booleans (B, S)."""
    if attention_mask.shape != x.shape[:2]:
        raise ValueError(f"M2RNN: attention_mask must be {tuple(x.shape[:2])}, got {tuple(attention_mask.shape)}")
    return attention_mask.to(torch.bool)
