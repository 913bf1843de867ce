"""The offsets of a packed batch, which are read once on the host as long as they stay the same."""

from __future__ import annotations

import weakref
from itertools import pairwise

import torch
from torch import Tensor

_OFFSETS: dict[int, tuple[weakref.ref[Tensor], int | None, int]] = {}
"""Offsets that passed, by identity: a weak reference, the version of their content, the tokens they end at."""


def check_offsets(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ValueError unless the offsets start at 0, never decrease and end at ``tokens``.

    Reading them waits for the GPU, so offsets that passed are not read again until their content changes; nor under
    the capture of a CUDA graph, which forbids it, nor on the meta device. Kernels never leave the tensors, whatever the
    offsets.
    """
    if cu_seqlens.is_meta or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    key = id(cu_seqlens)
    passed = _OFFSETS.get(key)
    if passed is not None and version is not None and passed[0]() is cu_seqlens and passed[1:] == (version, tokens):
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"m2rnn: cu_seqlens must start at 0, got {offsets[0]}")
    for i, (one, other) in enumerate(pairwise(offsets)):
        if other < one:
            raise ValueError(f"m2rnn: cu_seqlens must not decrease, got {other} at index {i + 1} after {one}")
    if offsets[-1] != tokens:
        raise ValueError(f"m2rnn: cu_seqlens must end at the {tokens} tokens of q, got {offsets[-1]}")
    _OFFSETS[key] = (weakref.ref(cu_seqlens, lambda _: _OFFSETS.pop(key, None)), version, tokens)
