"""The offsets of a packed batch, which are read once on the host as long as they stay the same, or come with a copy."""

from __future__ import annotations

import weakref
from itertools import pairwise

import torch
from torch import Tensor

_OFFSETS: dict[int, tuple[weakref.ref[Tensor], int | None, int]] = {}
"""Offsets that passed, by identity: a weak reference, the version of their content, the tokens they end at."""


def check_host_offsets(cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None) -> None:
    """Raise TypeError or ValueError unless the host's copy of the offsets may be one; what it holds is read later."""
    if cu_seqlens_cpu is None:
        return
    if not isinstance(cu_seqlens_cpu, Tensor):
        raise TypeError(f"m2rnn: cu_seqlens_cpu must be a tensor, got {type(cu_seqlens_cpu).__name__}")
    if cu_seqlens is None:
        raise ValueError("m2rnn: cu_seqlens_cpu must come with cu_seqlens, of which it is a copy")
    if cu_seqlens_cpu.device.type != "cpu":
        raise ValueError(f"m2rnn: cu_seqlens_cpu must be on the CPU, got {cu_seqlens_cpu.device}")
    if cu_seqlens_cpu.shape != cu_seqlens.shape:
        expected, given = tuple(cu_seqlens.shape), tuple(cu_seqlens_cpu.shape)
        raise ValueError(f"m2rnn: cu_seqlens_cpu must be {expected} as cu_seqlens is, got {given}")
    if cu_seqlens_cpu.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"m2rnn: cu_seqlens_cpu must be torch.int32 or torch.int64, got {cu_seqlens_cpu.dtype}")


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
