"""Pools of states in tests: their operands, and slots that show whether anybody touched them."""

from __future__ import annotations

from typing import Any

import torch
from calls import arguments
from torch import Tensor

from m2gen.problem import Inputs

PER_TOKEN = ("q", "k", "v", "forget")
_POISON = {
    torch.float32: (torch.int32, 0x7FE5A5A5),
    torch.bfloat16: (torch.int16, 0x7FE5),
    torch.float16: (torch.int16, 0x7E5A),
}


def operands_of(inputs: Inputs) -> dict[str, Tensor]:
    """Return what every call on a pool takes but the pool, by name."""
    return arguments(inputs, (*PER_TOKEN, "weight", "A_log", "dt_bias"))


def tokens(operands: dict[str, Tensor], which: Any) -> dict[str, Tensor]:
    """Return the operands (B, T, ...) of some tokens."""
    return {name: x[:, which] if name in PER_TOKEN else x for name, x in operands.items()}


def requests(operands: dict[str, Tensor], which: Any) -> dict[str, Tensor]:
    """Return the operands (B, ...) of some requests."""
    return {name: x[which] if name in PER_TOKEN else x for name, x in operands.items()}


def poisoned(slots: int, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a pool of NaN, which shows in whatever reads it, and that of a kind which shows whoever writes it."""
    weight = inputs.weight
    total = max(x.shape[-2] for x in (inputs.q, inputs.k, inputs.v))
    total = max(total, weight.shape[0], inputs.forget.shape[-1])
    shape = (slots, total, inputs.q.shape[-1], inputs.v.shape[-1])
    return poison(torch.empty(shape, dtype=dtype, device=weight.device))


def poison(pool: Tensor) -> Tensor:
    """Fill a pool, in place, with a NaN that no arithmetic makes."""
    bits, pattern = _POISON[pool.dtype]
    pool.view(bits).fill_(pattern)
    return pool


def untouched(pool: Tensor) -> bool:
    """Say whether every bit of a pool is as ``poison`` left it."""
    bits, pattern = _POISON[pool.dtype]
    return bool((pool.view(bits) == pattern).all())


def ints(*values: Any, dtype: torch.dtype = torch.int32, like: Tensor) -> Tensor:
    """Return indices beside a tensor."""
    return torch.tensor(values, dtype=dtype, device=like.device)
