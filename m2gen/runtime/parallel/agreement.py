"""Ranks of a group choose the same schedules, which is looked at once: they have one package, and alike GPUs."""

from __future__ import annotations

import hashlib
from weakref import WeakSet

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from .. import built, dispatch

_AGREED: WeakSet[ProcessGroup] = WeakSet()
"""Groups whose ranks were found to choose alike."""


class RanksDifferError(RuntimeError):
    """Ranks that would run their heads by other kernels than the first rank of their group."""


def check_ranks_agree(group: ProcessGroup) -> None:
    """Raise RanksDifferError, on every rank, if any would choose other kernels than the first; all must call it.

    A choice depends on the package's content, on the arch and SMs of the GPU and, for the bits of results, on torch.
    Groups that were found to agree are not asked again.
    """
    if torch.compiler.is_compiling() or group in _AGREED:
        return
    facts = _facts()
    digest = hashlib.sha256(repr(facts).encode()).digest()[:7]
    number = int.from_bytes(digest, "big")
    device = _device(group)
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=device)
    if type(extremes) is not Tensor:  # a fake tensor has no values
        return
    distributed.all_reduce(extremes, distributed.ReduceOp.MIN, group=group)
    if extremes.tolist() != [number, -number]:
        raise RanksDifferError(_difference(facts, group))
    _AGREED.add(group)


def _facts() -> dict[str, str]:
    """Return what a rank's choices depend on."""
    here = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    arch, sms = dispatch.device_of(dispatch.present(here))
    return {"package": built.SPACE.name, "arch": arch, "SMs": str(sms), "torch": torch.__version__}


def _device(group: ProcessGroup) -> torch.device:
    """Return where tensors of a group's collectives are."""
    over_gpus = "nccl" in str(distributed.get_backend(group))
    return torch.device("cuda", torch.cuda.current_device()) if over_gpus else torch.device("cpu")


def _difference(facts: dict[str, str], group: ProcessGroup) -> str:
    """Return which ranks have what that the first has not."""
    everyone: list[dict[str, str] | None] = [None] * group.size()
    distributed.all_gather_object(everyone, facts, group=group)
    ranks = distributed.get_process_group_ranks(group)
    first = everyone[0] or {}
    found = [
        f"{name} must be {first[name]} as on rank {ranks[0]}, got {theirs[name]} on rank {rank}"
        for rank, theirs in zip(ranks, everyone, strict=True)
        for name in first
        if theirs is not None and theirs[name] != first[name]
    ]
    return f"M2RNN: ranks must choose the same schedules: {'; '.join(found)}"
