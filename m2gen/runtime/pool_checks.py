"""Check calls on pools of states: what is wrong with their tensors, and under M2GEN_DEBUG=1 with the slots in them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .operands import Tensors, check_operands

DEBUG = os.environ.get("M2GEN_DEBUG") == "1"
"""Whether slots are read on the host and checked, which waits for a GPU."""
POOL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OWN = ("pool", "state", "indices", "out_indices", "accepted", "rounding_seed", "has_initial_state", "states_indices")
_WHOLE = (torch.int32, torch.int64)
_DTYPES = {
    "indices": _WHOLE, "out_indices": _WHOLE, "accepted": _WHOLE, "rounding_seed": (torch.int64,),
    "has_initial_state": (torch.bool,), "states_indices": _WHOLE,
}  # fmt: skip


def check_pooled(caller: str, lead: tuple[str, ...], tensors: Tensors, compiled: bool) -> None:
    """Raise one error for the first thing wrong with a call whose last tensor is its pool."""
    check_operands(caller, lead, {name: x for name, x in tensors.items() if name not in _OWN}, compiled)
    q, cu_seqlens, name = tensors["q"], tensors.get("cu_seqlens"), _last(tensors)
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    total = max(tensors["weight"].shape[0], *(tensors[each].shape[-2] for each in "qkv"), tensors["forget"].shape[-1])
    _check_pool(caller, name, tensors[name], q, (total, q.shape[-1], tensors["v"].shape[-1]))
    for own in _DTYPES:
        check_own(caller, own, tensors.get(own), q)
    steps = q.shape[1] if caller == "m2rnn_steps" else None
    for own, expected in _shapes(tensors, batch, steps):
        x = tensors.get(own)
        if x is not None and tuple(x.shape) not in expected:
            allowed = " or ".join(map(str, dict.fromkeys(expected)))
            raise ValueError(f"{caller}: {own} must be {allowed}, got {tuple(x.shape)}")
    _check_table(caller, tensors, batch, steps)
    seed, pool = tensors.get("rounding_seed"), tensors[name]
    if seed is not None and pool.dtype == torch.float32:
        raise TypeError(f"{caller}: rounding_seed must come with a {name} in bfloat16 or float16, got {pool.dtype}")


def _last(tensors: Tensors) -> str:
    *_, name = tensors
    return name


def _check_pool(caller: str, name: str, pool: Tensor, q: Tensor, state: tuple[int, int, int]) -> None:
    if not isinstance(pool, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor, got {type(pool).__name__}")
    if pool.dim() != 4 or tuple(pool.shape[1:]) != state:
        expected = f"(slots, {', '.join(map(str, state))})"
        raise ValueError(f"{caller}: {name} must be {expected}, got {tuple(pool.shape)}")
    if pool.dtype not in POOL_DTYPES:
        raise TypeError(f"{caller}: {name} must be torch.float32, torch.bfloat16 or torch.float16, got {pool.dtype}")
    if pool.device != q.device:
        raise ValueError(f"{caller}: {name} must be on {q.device} as q is, got {pool.device}")


def check_own(caller: str, name: str, x: object, q: Tensor) -> None:
    """Raise TypeError or ValueError for an argument of another dtype, or apart from q."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES[name]:
        raise TypeError(f"{caller}: {name} must be {' or '.join(map(str, _DTYPES[name]))}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{caller}: {name} must be on {q.device} as q is, got {x.device}")


def _shapes(tensors: Tensors, batch: int, steps: int | None) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """Yield the shapes that arguments may have; the table of slots is looked at apart."""
    yield "out_indices", [(batch,)] if steps is None else [(batch, steps), (batch,)]
    if steps is None:
        yield "indices", [(batch,)]
    yield "accepted", [(batch,)]
    yield "rounding_seed", [(), (1,), (batch,)]
    yield "has_initial_state", [(batch,)]


def _check_table(caller: str, tensors: Tensors, batch: int, steps: int | None) -> None:
    """Check the slots that calls of several tokens start from, and whether those to write to follow from them."""
    states = tensors.get("states_indices")
    if states is not None and (states.dim() != 2 or states.shape[0] != batch):
        raise ValueError(f"{caller}: states_indices must be ({batch}, M), got {tuple(states.shape)}")
    indices, given = tensors.get("indices"), "accepted" if tensors.get("accepted") is not None else None
    if indices is None:
        raise TypeError(f"{caller}: indices must be a tensor, got NoneType")
    if steps is None:
        return
    if indices.dim() not in (1, 2) or indices.shape[0] != batch:
        raise ValueError(
            f"{caller}: indices must be ({batch},), or ({batch}, C) with accepted, got {tuple(indices.shape)}"
        )
    if (indices.dim() == 2) != (given is not None):
        got = f"{tuple(indices.shape)} {'with' if given else 'without'} it"
        raise ValueError(f"{caller}: indices must be ({batch}, C) with accepted and ({batch},) without, got {got}")
    if tensors.get("out_indices") is None and indices.dim() == 2 and indices.shape[1] != steps:
        got = f"indices {tuple(indices.shape)}"
        raise ValueError(f"{caller}: out_indices must be given unless indices are ({batch}, {steps}), got {got}")


def check_slots(caller: str, slots: int, indices: Tensor, out_indices: Tensor, accepted: Tensor | None = None) -> None:
    """Raise IndexError or ValueError if slots are not in the pool, or what a request writes another one touches.

    Reads them on the host, so it does nothing under a compiler, on meta tensors or while a CUDA graph is captured.
    """
    if torch.compiler.is_compiling() or indices.is_meta or isinstance(indices, FakeTensor):
        return
    if indices.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    _check_range(caller, "indices", indices, slots)
    _check_range(caller, "out_indices", out_indices, slots)
    starts = indices.tolist()
    if accepted is not None:
        columns, counts = indices.shape[1], accepted.tolist()
        if max(counts, default=0) > columns:
            raise IndexError(f"{caller}: accepted must be at most indices' {columns} columns, got {max(counts)}")
        starts = [row[count - 1] if count > 0 else -1 for row, count in zip(starts, counts, strict=True)]
    prompts = caller == "m2rnn"  # which reads all states before it writes one, and skips nobody
    owners: dict[int, int] = {}
    for b, row in enumerate(out_indices.reshape(len(starts), -1).tolist()):
        for slot in row:
            if slot >= 0 and (prompts or starts[b] >= 0) and owners.setdefault(slot, b) != b:
                raise ValueError(f"{caller}: out_indices must name a slot for one request alone, got {slot} for two")
    if not prompts:
        _check_races(caller, starts, owners)


def _check_range(caller: str, name: str, x: Tensor, slots: int) -> None:
    largest = int(x.max()) if x.numel() else -1
    if largest >= slots:
        raise IndexError(f"{caller}: {name} must be below the pool's {slots} slots, got {largest}")


def _check_races(caller: str, starts: list[int], owners: dict[int, int]) -> None:
    for b, slot in enumerate(starts):
        if slot >= 0 and owners.get(slot, b) != b:
            raise ValueError(f"{caller}: out_indices must not name slot {slot}, which another request starts from")
