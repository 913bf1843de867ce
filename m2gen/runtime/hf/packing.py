"""Sequences that lie one after the other in a batch: where they begin, and what attention is told of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..mixer import Device
from ..offsets import check_host_offsets


@dataclass(frozen=True)
class Packed:
    """Offsets (sequences + 1,) of the sequences in B S tokens, one row after the other, and a copy on the CPU."""

    cu_seqlens: Tensor
    cu_seqlens_cpu: Tensor | None = None

    def to(self, device: Device, non_blocking: bool = False) -> Packed:
        """Return the same for a block on another device, as accelerate asks whatever has this method."""
        return Packed(self.cu_seqlens.to(device, non_blocking=non_blocking), self.cu_seqlens_cpu)

    def numbers(self, x: Tensor) -> Tensor:
        """Return the number of the sequence that each of the tokens x (B, S, ...) is of, (B, S)."""
        token = torch.arange(x.shape[0] * x.shape[1], device=self.cu_seqlens.device)
        return torch.bucketize(token, self.cu_seqlens[1:], right=True).view(x.shape[:2])

    def positions(self, numbers: Tensor) -> Tensor:
        """Return the position of each token in its sequence, (B, S)."""
        token = torch.arange(numbers.numel(), device=numbers.device).view(numbers.shape)
        starts = self.cu_seqlens.long()
        return token - starts[numbers.clamp(max=max(starts.shape[0] - 2, 0))]

    def for_attention(self) -> dict[str, Any]:
        """Return what transformers' flash attention takes.

        The length that it needs comes of the copy, since to ask the device waits; compiled code asks neither.
        """
        offsets = self.cu_seqlens.int()
        known: dict[str, Any] = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
        if self.cu_seqlens_cpu is not None and not torch.compiler.is_compiling():
            known |= dict.fromkeys(("max_length_q", "max_length_k"), _longest(self.cu_seqlens_cpu))
        return known


def _longest(offsets: Tensor) -> int:
    return max((end - start for start, end in pairwise(offsets.tolist())), default=0)


def packed_of(cu_seqlens: Tensor | None, cu_seqlens_cpu: Any) -> Packed | None:
    """Return the sequences of these offsets, None where there are none.

    The copy may be numbers or an array of numpy, which trainers leave on the host; numbers are constants of compiled
    code. Raises ValueError or TypeError for one that is no copy.
    """
    if cu_seqlens_cpu is not None and not isinstance(cu_seqlens_cpu, Tensor):
        cu_seqlens_cpu = torch.as_tensor(cu_seqlens_cpu)
    check_host_offsets(cu_seqlens, cu_seqlens_cpu)
    return None if cu_seqlens is None else Packed(cu_seqlens, cu_seqlens_cpu)


def found_in(position_ids: Tensor, batch: int) -> Packed | None:
    """Return the sequences of B S tokens whose positions (1 or B, S) begin anew within a row, None if none do.

    Asking waits for the device.
    """
    rows = position_ids.expand(batch, -1)
    begins = F.pad(rows.diff(dim=-1) != 1, (1, 0), value=True)
    if not bool(begins[:, 1:].any()):
        return None
    starts = begins.flatten().nonzero().squeeze(-1)
    return Packed(F.pad(starts, (0, 1), value=begins.numel()))
