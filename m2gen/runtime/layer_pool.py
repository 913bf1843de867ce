"""States of many requests of a layer in one pool: prompts and tokens by the slots that they start from and end in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fused, library, pool_checks
from .cache import check_holds
from .decode import by_kernel
from .layer import M2RNN
from .memory import ITSELF, overlaps_itself
from .mixer import Device, shapes_of, wants_gradients
from .not_built import check_built

__all__ = ["M2RNNPool"]


class M2RNNPool:
    """States of a layer in slots, which an engine hands out to requests: it is written in place, without gradients.

    ``conv`` (slots, conv_width - 1, C) or (slots, C, conv_width - 1) has the last inputs of the convolution, ``state``
    (slots, N, K, V) the recurrence's states, in float32, bfloat16 or float16; both may be views
    with padding between slots.

    ``indices`` (B,) of a call, int32 or int64 on the device, are the slots that requests start from, and
    ``out_indices``, or these, the ones that they end in. A negative one, or one that the pool does not have, is neither
    read nor written. What a slot holds that no call names does not matter and does not change.

    Raises ValueError or TypeError for tensors of other shapes or dtypes, or apart from the layer, RuntimeError for some
    whose elements share memory, and VariantNotBuiltError for a layer whose dims no kernels serve.
    """

    def __init__(self, layer: M2RNN, conv: Tensor, state: Tensor) -> None:
        check_built(layer.state_expansion, layer.head_dim, layer.heads, layer.state_weight.dtype)
        wanted, states = shapes_of(layer, max(state.shape[0], 1) if state.dim() else 1)
        if conv.shape != wanted and conv.mT.shape == wanted:
            conv = conv.mT
        for name, x, shape in (("conv", conv, wanted), ("state", state, states)):
            if x.shape != shape:
                raise ValueError(f"M2RNNPool: {name} must be {tuple(shape)}, got {tuple(x.shape)}")
            if x.device != layer.state_weight.device:
                raise ValueError(f"M2RNNPool: {name} must be on {layer.state_weight.device}, got {x.device}")
            if overlaps_itself(x.shape, x.stride()):
                raise RuntimeError(f"M2RNNPool: {name}: {ITSELF}")
        if state.dtype not in pool_checks.POOL_DTYPES:
            raise TypeError(
                f"M2RNNPool: state must be {' or '.join(map(str, pool_checks.POOL_DTYPES))}, got {state.dtype}"
            )
        self.layer, self.conv, self.state = layer, conv, state

    @classmethod
    def allocate(
        cls,
        layer: M2RNN,
        slots: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> M2RNNPool:
        """Return a pool of zeros, whose options are those of ``M2RNN.allocate_cache``."""
        cache = layer.allocate_cache(slots, device, dtype, state_dtype)
        return cls(layer, cache.conv, cache.state)

    def prefill(
        self,
        x: Tensor,
        indices: Tensor,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        *,
        out_indices: Tensor | None = None,
        has_initial_state: Tensor | None = None,
    ) -> Tensor:
        """Return what the layer makes of prompts, or chunks of them, x (B, S, hidden) or (T, hidden) with cu_seqlens.

        A sequence starts from its slot, or from zeros where it has none or ``has_initial_state`` (B,) is false, and
        leaves its states in its slot. Nothing is read on the host if cu_seqlens_cpu comes with cu_seqlens.
        """
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        out = self._checked("prefill", x, batch, indices, out_indices)
        has = _within(indices, self.conv.shape[0])
        if has_initial_state is not None:
            pool_checks.check_own("M2RNNPool.prefill", "has_initial_state", has_initial_state, x)
            if has_initial_state.shape != (batch,):
                got = tuple(has_initial_state.shape)
                raise ValueError(f"M2RNNPool.prefill: has_initial_state must be ({batch},), got {got}")
            has = has & has_initial_state
        y, conv, last = self.layer.scan(x, *self._taken(indices, has), cu_seqlens, cu_seqlens_cpu)
        check_holds(self, conv.dtype)
        self._leave(out, conv, last)
        return y

    def step(self, x: Tensor, indices: Tensor, out_indices: Tensor | None = None) -> Tensor:
        """Return what the layer makes of a token of each request, x (B, hidden); zeros for those without a slot."""
        if x.dim() != 2 or x.shape[1] != self.layer.hidden_size:
            raise ValueError(f"M2RNNPool.step: x must be (B, {self.layer.hidden_size}), got {tuple(x.shape)}")
        out = self._checked("step", x, x.shape[0], indices, out_indices)
        if fused.computes(self.layer, x) and fused.reads_projection(self.layer, x):
            y = by_kernel(self.layer, x, self, indices, None if out is indices else out)
        else:
            there = _within(indices, self.conv.shape[0])
            y = self.prefill(x[:, None], indices, out_indices=torch.where(there, out, -1))[:, 0]
        return y.masked_fill(~_within(indices, self.conv.shape[0])[:, None], 0)

    def steps(self, x: Tensor, indices: Tensor, accepted: Tensor, out_indices: Tensor | None = None) -> Tensor:
        """Return what the layer makes of T tokens of each request, x (B, T, hidden), and keep the states after each.

        ``indices`` (B, C) is a table of slots: request b starts from ``indices[b, accepted[b] - 1]``, ``accepted``
        (B,) being how many tokens of the call before count. ``out_indices`` (B, T), or the table, are the slots of the
        states after each token; a request's own slots are apart.
        """
        table = indices if out_indices is None else out_indices
        _check_tensors("M2RNNPool.steps", indices=indices, out_indices=table)
        if x.dim() != 3 or indices.dim() != 2 or table.shape != x.shape[:2]:
            raise ValueError(
                f"M2RNNPool.steps: x must be (B, T, hidden), indices (B, C) and out_indices (B, T), "
                f"got {tuple(x.shape)}, {tuple(indices.shape)} and {tuple(table.shape)}"
            )
        _check_numbers("M2RNNPool.steps", x.shape[0], self.state.device, accepted=accepted)
        if not x.shape[0]:
            return torch.empty_like(x)
        column = accepted.long() - 1
        there = (column >= 0) & (column < indices.shape[1])
        source = torch.where(there, indices.gather(1, column.clamp(0, indices.shape[1] - 1)[:, None])[:, 0], -1)
        began = _within(source, self.state.shape[0])
        if pool_checks.DEBUG:  # all columns at once, as requests may race at two of them
            pool_checks.check_slots("M2RNNPool.steps", self.state.shape[0], source, table)
        places = [self._checked("steps", x, x.shape[0], source, table[:, t]) for t in range(x.shape[1])]
        conv, state = self._taken(source, began)
        moving = M2RNNPool(self.layer, conv, state.to(self.state.dtype))  # goes on where a token's state has no slot
        here, tokens = torch.where(began, torch.arange(x.shape[0], device=x.device), -1), []
        for t, out in enumerate(places):
            tokens.append(moving.step(x[:, t], here))
            self._leave(torch.where(began, out, -1), moving.conv, moving.state)
        return torch.stack(tokens, 1) if tokens else torch.empty_like(x)

    def _taken(self, indices: Tensor, has: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states in slots, conv and in float32 state; zeros where ``has`` (B,) is false."""
        conv = torch.where(has[:, None, None], self.conv[torch.where(has, indices, 0).long()], 0)
        return conv, library.OPERATORS.POOL_GATHER(self.state, indices, has, self._dims)

    def _leave(self, indices: Tensor, conv: Tensor, state: Tensor) -> None:
        """Write states of sequences into slots."""
        library.OPERATORS.POOL_SCATTER(state.float(), indices, None, self._dims, self.state)
        _put(self.conv, indices, conv)

    @property
    def _dims(self) -> list[int]:
        return [self.layer.state_expansion, self.layer.head_dim, *self.layer.heads]

    def _checked(self, call: str, x: Tensor, batch: int, indices: Tensor, out_indices: Tensor | None) -> Tensor:
        """Return the slots to write, once they and those to read are found to be fit."""
        caller = f"M2RNNPool.{call}"
        if wants_gradients(self.layer, x, self.conv, self.state):
            raise RuntimeError(f"{caller} computes no gradients; call it under torch.no_grad()")
        fused.check_projected(caller, self.layer, x)
        out = indices if out_indices is None else out_indices
        _check_numbers(caller, batch, self.state.device, indices=indices, out_indices=out)
        if pool_checks.DEBUG:
            pool_checks.check_slots("m2rnn" if call == "prefill" else caller, self.state.shape[0], indices, out)
        return out


def _check_tensors(caller: str, **given: Any) -> None:
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{caller}: {name} must be a tensor, got {type(x).__name__}")


def _check_numbers(caller: str, batch: int, device: torch.device, **given: Tensor) -> None:
    """Raise an error for the first that is not an integer for each of ``batch`` requests, on the pool's device."""
    _check_tensors(caller, **given)
    for name, x in given.items():
        if x.shape != (batch,):
            raise ValueError(f"{caller}: {name} must be ({batch},), got {tuple(x.shape)}")
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{caller}: {name} must be torch.int32 or torch.int64, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{caller}: {name} must be on {device}, got {x.device}")


def _within(indices: Tensor, slots: int) -> Tensor:
    return (indices >= 0) & (indices < slots)


def _put(pool: Tensor, indices: Tensor, rows: Tensor) -> None:
    """Copy rows (B, ...) into the slots of a pool that there are; those without one write what another writes, too."""
    if not rows.numel():
        return
    there = _within(indices, pool.shape[0])
    row = torch.where(there, torch.arange(rows.shape[0], device=rows.device), there.int().argmax())
    any_there = there.any()
    slot = torch.where(any_there, indices[row], 0)
    values = torch.where(any_there, rows[row].to(pool.dtype), pool[:1])
    pool.index_copy_(0, slot.long(), values)
