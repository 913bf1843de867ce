"""States of the layer between calls: caches updated in place, and states that a call takes and returns."""

from __future__ import annotations

import itertools
from typing import Any, Protocol

import torch
from torch import Tensor

from .memory import ITSELF
from .mixer import Device, Mixer, shapes_of, wide_dtype

__all__ = ["M2RNNCache"]

NUMBERS = itertools.count()
"""Counter that numbers the layers of this process."""


class M2RNNCache:
    """State of B sequences: conv (B, conv_width - 1, C), the last inputs of the convolution, and state (B, N, K, V).

    A layer without a convolution has conv (B, 0, C).

    Calls write both in place, so that a captured CUDA graph finds them where they were; a call that fails writes
    neither. ``owner`` is the number of the layer that the cache is of, None for any; a copy is of any.
    """

    in_place = True

    def __init__(self, conv: Tensor, state: Tensor, owner: int | None = None) -> None:
        self.conv, self.state, self.owner = conv, state, owner

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "owner": None}  # numbers are this process's; a copied model has a copied cache

    def reset(self) -> None:
        """Go back to the beginning of every sequence."""
        self.conv.zero_()
        self.state.zero_()


class States:
    """States that ``scan`` hands to a layer, whose call writes nothing in place and returns the states after it.

    It is no tuple, whose tensors a wrapper such as FSDP would cast with the inputs.
    """

    in_place = False

    def __init__(self, conv: Tensor | None, state: Tensor | None) -> None:
        self.conv, self.state = conv, state


def allocate_cache(
    layer: Mixer,
    batch_size: int,
    device: Device = None,
    dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
) -> M2RNNCache:
    """Do what ``M2RNN.allocate_cache`` does, of any module with the attributes of an ``M2RNN``."""
    if device is None:
        weight = layer.state_weight
        device = next((p.device for p in (weight, *layer.parameters()) if not p.is_meta), weight.device)
    if dtype is None:
        weights = () if layer.conv1d is None else layer.conv1d.parameters()
        dtype = next((p.dtype for p in weights if p.is_floating_point()), layer.state_weight.dtype)
    wide = wide_dtype(layer.state_weight)
    if state_dtype not in (None, wide, torch.float32, torch.bfloat16):
        raise TypeError(f"M2RNN: state_dtype must be torch.float32 or torch.bfloat16, got {state_dtype}")
    conv, state = shapes_of(layer, batch_size)
    return M2RNNCache(
        torch.zeros(conv, device=device, dtype=dtype),
        torch.zeros(state, device=device, dtype=state_dtype or wide),
        getattr(layer, "number", None),
    )


def sequences_of(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return how many sequences x has; raises ValueError for offsets that cannot be any."""
    if cu_seqlens is None:
        return x.shape[0]
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or (cu_seqlens.shape[0] < 2 and x.shape[0]):
        raise ValueError(f"M2RNN: cu_seqlens must be (B + 1,), got {tuple(cu_seqlens.shape)} for {x.shape[0]} tokens")
    return cu_seqlens.shape[0] - 1


def check_states(layer: Mixer, x: Tensor, conv: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Raise ValueError for offsets or states of another shape; what offsets hold is the operator's to read."""
    shapes = shapes_of(layer, sequences_of(x, cu_seqlens))
    for name, given, shape in zip(("conv", "state"), (conv, state), shapes, strict=True):
        if given is not None and given.shape != shape:
            raise ValueError(f"M2RNN: {name} must be {tuple(shape)}, got {tuple(given.shape)}")


def check_cache(layer: Mixer, cache: M2RNNCache, x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raise one error for the first thing for which a call on x cannot move ``cache`` on, before it begins."""
    for name, shape in zip(("conv", "state"), shapes_of(layer, sequences_of(x, cu_seqlens)), strict=True):
        given = getattr(cache, name, None)
        if not isinstance(given, torch.Tensor):
            raise TypeError(f"M2RNN: cache must be what allocate_cache returns, got {type(cache).__name__}")
        if given.shape != shape:
            raise ValueError(f"M2RNN: cache.{name} must be {tuple(shape)}, got {tuple(given.shape)}")
        if given.device != x.device:
            raise ValueError(f"M2RNN: cache.{name} must be on {x.device} as x is, got {given.device}")
        _check_writable(f"cache.{name}", given)
    if cache.state.dtype not in (torch.promote_types(x.dtype, torch.float32), torch.float32, torch.bfloat16):
        raise TypeError(f"M2RNN: cache.state must be torch.float32 or torch.bfloat16, got {cache.state.dtype}")
    if torch.compiler.is_compiling():
        return  # layers of one shape share what is compiled, which their numbers would forbid
    owner, number = getattr(cache, "owner", None), getattr(layer, "number", None)
    if None not in (owner, number) and owner != number:
        raise ValueError(f"M2RNN: cache must be of this layer, number {number}, got one of layer number {owner}")


def _check_writable(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise RuntimeError(f"M2RNN: {name} must not require a gradient; scan has states with gradients")
    if not torch.compiler.is_compiling() and x.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"M2RNN: {name} was made under torch.inference_mode() and must be used under it")
    if _overlaps(x):
        raise RuntimeError(f"M2RNN: {name}: {ITSELF}")


def _overlaps(x: Tensor) -> bool:
    """Whether elements of x share memory; strides that no view of a dense tensor has count as sharing."""
    if x.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride <= reach:
            return x.numel() > 0
        reach += stride * (size - 1)
    return False


class Convolved(Protocol):
    """What has the last inputs of a convolution."""

    conv: Tensor


def check_holds(cache: Convolved, dtype: torch.dtype) -> None:
    """Raise TypeError where the cache would round the convolution's inputs."""
    if torch.promote_types(cache.conv.dtype, dtype) != cache.conv.dtype:
        raise TypeError(f"M2RNN: cache.conv must be {dtype}, as what is convolved is, or wider, got {cache.conv.dtype}")


def commit(cache: M2RNNCache, conv: Tensor, state: Tensor) -> None:
    """Write both states, or raise before either is written; nothing that may fail comes after."""
    check_holds(cache, conv.dtype)
    cache.conv.copy_(conv)
    cache.state.copy_(state)
