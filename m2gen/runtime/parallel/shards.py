"""Parameters that lie over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from .collectives import copied


def placement(count: int, mesh: DeviceMesh) -> Shard | Replicate:
    """Return how ``count`` groups lie over the ranks: shared out, or whole on each."""
    return Shard(0) if count % mesh.size() == 0 else Replicate()


def sharded(
    full: Tensor, mesh: DeviceMesh, placement: Shard | Replicate, requires_grad: bool | None = None
) -> nn.Parameter:
    """Return the first rank's values as a parameter, a DTensor, that wants gradients as ``full`` does."""
    placed = distribute_tensor(full.detach().clone(), mesh, [placement])
    return nn.Parameter(placed, requires_grad=full.requires_grad if requires_grad is None else requires_grad)


def own(parameters: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Return of each parameter the rows, of so many groups, that this rank's heads read.

    Gradients of rows that ranks share are summed, those of all parameters at once.
    """
    shared = [p for p in parameters if not _distributed(p).placements[0].is_shard()]
    same: dict[int, Tensor] = {}
    if shared:
        mesh, here = _distributed(shared[0]).device_mesh, [local(p) for p in shared]
        joint = torch.split(copied(torch.cat(here), mesh.get_group()), [x.shape[0] for x in here])
        same = {id(p): x for p, x in zip(shared, joint, strict=True)}
    return [
        _read(same[id(p)], count, _distributed(p).device_mesh) if id(p) in same else local(p)
        for p, count in zip(parameters, counts, strict=True)
    ]


def _read(rows: Tensor, count: int, mesh: DeviceMesh) -> Tensor:
    """Return the group, of ``count``, that this rank's heads read."""
    size = rows.shape[0] // count
    first = mesh.get_local_rank() * count // mesh.size() * size
    return rows[first : first + size]


class _Local(torch.autograd.Function):
    """What a rank holds of a parameter, whose gradient lies over ranks as that does.

    ``DTensor.to_local`` gives the same after checks that take the host longer than GPUs take for a layer of many
    parameters.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        given: Any = parameter
        ctx.spec = given._spec
        here: Tensor = given._local_tensor
        return here.view_as(here)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        made: Callable[..., Tensor] = DTensor
        return made(gradient.contiguous(), ctx.spec, requires_grad=False)


_local: Callable[[Tensor], Tensor] = _Local.apply


def local(parameter: Tensor) -> Tensor:
    """Return what this rank holds of a parameter."""
    if torch.compiler.is_compiling():
        return _distributed(parameter).to_local()
    return _local(parameter)


def whole(parameter: Tensor) -> Tensor:
    """Return all of a parameter on every rank; all ranks must call it."""
    return _distributed(parameter).full_tensor()


def _distributed(parameter: Tensor) -> DTensor:
    """Take a parameter for what it is: torch makes a DTensor of a DTensor's parameter."""
    return cast(DTensor, parameter)
