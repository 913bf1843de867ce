"""Ranks of a group choose the same schedules and make the same calls, each of which is looked at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from .. import built, dispatch

MOST_CALLS = 64
"""Kinds of a form's calls over a group that are looked at: were each of another kind, each would wait for that."""

_AGREED: WeakSet[ProcessGroup] = WeakSet()
"""Groups whose ranks were found to choose alike."""
_CALLS: WeakKeyDictionary[ProcessGroup, dict[str, set[Hashable]]] = WeakKeyDictionary()
"""Kinds of calls over groups that were found to be alike on their ranks, by form."""
_FAULT = "fault"


class RanksDifferError(RuntimeError):
    """Ranks that run other kernels than the first rank of their group, or call a layer otherwise than that does."""


def check_ranks_agree(group: ProcessGroup) -> None:
    """Raise RanksDifferError, on every rank, if any would choose other kernels than the first; all must call it.

    A choice depends on the package's content, on the arch and SMs of the GPU and, for the bits of results, on torch.
    Groups that were found to agree are not asked again.
    """
    if torch.compiler.is_compiling() or group in _AGREED:
        return
    facts = _facts()
    same = _alike(facts, group)
    if same is None:
        return
    if not same:
        raise RanksDifferError(f"M2RNN: ranks must choose the same schedules: {_difference(facts, group)}")
    _AGREED.add(group)


def check_calls_agree(group: ProcessGroup, form: str, kind: Hashable, facts: Callable[[], Mapping[str, str]]) -> None:
    """Raise RanksDifferError where calls have other ``facts`` than the first rank's: ranks would wait for each other.

    They ask each other at the first call of each kind of a form alone, and nothing is looked at later; a ``kind`` is
    what they have in common if they are right. What ``facts`` raises of a wrong call, at the first of a form, has the
    other ranks raise, too; later they may know their own kind of call and not ask, so that it is raised there alone.
    """
    seen = None if torch.compiler.is_compiling() else _CALLS.setdefault(group, {}).setdefault(form, set())
    if seen is None or kind in seen or len(seen) >= MOST_CALLS or _is_blind():
        return
    fault: Exception | None = None
    try:
        here = dict(facts())
    except (TypeError, ValueError) as error:
        if seen:
            raise
        fault, here = error, {_FAULT: str(error)}
    difference = "" if _alike(here, group) else _difference(here, group)
    if fault is not None:
        raise fault
    if difference:
        raise RanksDifferError(f"M2RNN: ranks must make the same call: {difference}")
    seen.add(kind)


def offsets_of(cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None) -> str:
    """Return the offsets of a packed batch, for facts of a call."""
    given = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    return str(given if given is None or given.is_meta else given.tolist())


def _is_blind() -> bool:
    """Whether tensors are fake, without values, or calls are captured in a CUDA graph, which nothing waits for."""
    fake = type(torch.empty(0, device="cpu")) is not Tensor
    initialised = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return fake or (initialised and torch.cuda.is_current_stream_capturing())


def _facts() -> dict[str, str]:
    """Return what a rank's choices depend on."""
    here = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    arch, sms = dispatch.device_of(dispatch.present(here))
    return {"package": built.SPACE.name, "arch": arch, "SMs": str(sms), "torch": torch.__version__}


def _alike(facts: Mapping[str, str], group: ProcessGroup) -> bool | None:
    """Return whether all ranks have these facts, the same on each; None where tensors are fake, and have no values."""
    digest = hashlib.sha256(repr(facts).encode()).digest()[:7]
    number = int.from_bytes(digest, "big")
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=_device(group))
    if type(extremes) is not Tensor:
        return None
    distributed.all_reduce(extremes, distributed.ReduceOp.MIN, group=group)
    return bool(extremes.tolist() == [number, -number])


def _device(group: ProcessGroup) -> torch.device:
    """Return where tensors of a group's collectives are."""
    over_gpus = "nccl" in str(distributed.get_backend(group))
    return torch.device("cuda", torch.cuda.current_device()) if over_gpus else torch.device("cpu")


def _difference(facts: Mapping[str, str], group: ProcessGroup) -> str:
    """Return which ranks have what that the first has not, or which of them fail."""
    everyone: list[dict[str, str] | None] = [None] * group.size()
    distributed.all_gather_object(everyone, dict(facts), group=group)
    ranks = distributed.get_process_group_ranks(group)
    known = [(rank, theirs or {}) for rank, theirs in zip(ranks, everyone, strict=True)]
    faults = [f"got on rank {rank}: {theirs[_FAULT]}" for rank, theirs in known if _FAULT in theirs]
    first = known[0][1]
    found = [
        f"{name} must be {first[name]} as on rank {ranks[0]}, got {theirs[name]} on rank {rank}"
        for rank, theirs in known
        for name in first
        if name in theirs and theirs[name] != first[name]
    ]
    return "; ".join(faults or found)
