"""Check operands: shapes, devices and dtypes must fit together, and name a variant that was built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import built, dispatch
from .not_built import VariantNotBuiltError, not_built

Tensors: TypeAlias = Mapping[str, Any]
"""Arguments of a call by name: tensors, None where one is left out, or what somebody took for a tensor."""


def check_operands(caller: str, lead: tuple[str, ...], tensors: Tensors, compiled: bool) -> None:
    for name, x in tensors.items():
        if not (isinstance(x, Tensor) or (x is None and name in _OPTIONAL)):
            raise TypeError(f"{caller}: {name} must be a tensor, got {type(x).__name__}")
        if x is not None and x.layout is not torch.strided:
            raise TypeError(f"{caller}: {name} must be a strided tensor, got {x.layout}")
    _check_shapes(caller, lead, tensors)
    q, k, v, weight, forget, A_log = (tensors[name] for name in (*_OPERANDS, "A_log"))
    check_beside(caller, q, tensors)
    _check_dtypes(caller, tensors)
    if compiled:
        variant = dispatch.variant_of(q, k, v, weight, forget, A_log)
        if variant not in built.VARIANTS:
            raise VariantNotBuiltError(not_built(caller, variant))


def check_beside(caller: str, q: Tensor, tensors: Tensors) -> None:
    """Raise unless all tensors are where q is, and states and offsets, if there are any, have dtypes that they may."""
    for name, x in tensors.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{caller}: {name} must be on {q.device} as q is, got {x.device}")
    first, offsets = tensors.get("initial_state"), tensors.get("cu_seqlens")
    if first is not None and not first.is_floating_point():
        raise TypeError(f"{caller}: initial_state must be a floating-point tensor, got {first.dtype}")
    if offsets is not None and offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{caller}: cu_seqlens must be torch.int32 or torch.int64, got {offsets.dtype}")


_OPERANDS = ("q", "k", "v", "weight", "forget")
_OPTIONAL = ("A_log", "dt_bias", "initial_state", "cu_seqlens")
_TAILS = {"q": ("Nq", "K"), "k": ("Nk", "K"), "v": ("Nv", "V"), "forget": ("Nf",)}


def _check_shapes(caller: str, lead: tuple[str, ...], tensors: Tensors) -> None:
    q, k, v, weight, forget = (tensors[name] for name in _OPERANDS)
    for name, tail in _TAILS.items():
        x = tensors[name]
        if x.dim() != len(lead) + len(tail):
            raise ValueError(f"{caller}: {name} must be ({', '.join((*lead, *tail))}), got {tuple(x.shape)}")
        if x.shape[: len(lead)] != q.shape[: len(lead)]:
            expected = f"{tuple(q.shape[: len(lead)])} as q does"
            raise ValueError(f"{caller}: {name} must begin with {expected}, got {tuple(x.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{caller}: k must end with q's K = {q.shape[-1]}, got {tuple(k.shape)}")
    cols = v.shape[-1]
    if weight.dim() != 3 or weight.shape[1] != cols or weight.shape[2] != cols:
        raise ValueError(f"{caller}: weight must be (Nw, {cols}, {cols}), got {tuple(weight.shape)}")
    groups = {"q": q.shape[-2], "k": k.shape[-2], "v": v.shape[-2], "f": forget.shape[-1], "w": weight.shape[0]}
    total = max(groups.values())
    for name, count in groups.items():
        if count < 1 or total % count:
            raise ValueError(f"{caller}: heads of {name} must divide {total}, the most of any operand, got {count}")
    _check_gate(caller, tensors, forget.shape[-1])
    _check_states(caller, tensors, total)


def _check_gate(caller: str, tensors: Tensors, heads: int) -> None:
    given = [name for name in ("A_log", "dt_bias") if tensors[name] is not None]
    if len(given) == 1:
        raise ValueError(f"{caller}: A_log and dt_bias must be given together, got only {given[0]}")
    for name in given:
        shape = tuple(tensors[name].shape)
        if shape != (heads,):
            raise ValueError(f"{caller}: {name} must be ({heads},), one for each head of forget, got {shape}")


def _check_states(caller: str, tensors: Tensors, total: int) -> None:
    q, v, cu_seqlens = tensors["q"], tensors["v"], tensors.get("cu_seqlens")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1):
        raise ValueError(f"{caller}: cu_seqlens must be (B + 1,), got {tuple(cu_seqlens.shape)}")
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = (batch, total, q.shape[-1], v.shape[-1])
    for name in ("initial_state", "state"):
        x = tensors.get(name)
        if x is not None and x.shape != expected:
            raise ValueError(f"{caller}: {name} must be {expected}, got {tuple(x.shape)}")


def _check_dtypes(caller: str, tensors: Tensors) -> None:
    dtype = tensors["q"].dtype
    if not dtype.is_floating_point:
        raise TypeError(f"{caller}: q must be a floating-point tensor, got {dtype}")
    for name in ("k", "v", "weight", "forget", "A_log", "dt_bias"):
        x = tensors[name]
        wider = name not in ("k", "v")
        if x is not None and x.dtype != dtype and not (wider and x.dtype == torch.float32):
            either = " or torch.float32" if wider and dtype != torch.float32 else ""
            raise TypeError(f"{caller}: {name} must be {dtype}{either}, got {x.dtype}")
    state = tensors.get("state")
    if state is not None and state.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{caller}: state must be torch.float32 or torch.bfloat16, got {state.dtype}")
