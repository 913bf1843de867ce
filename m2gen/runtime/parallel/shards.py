"""Parameters that lie over ranks."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
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


def own(parameter: Tensor, count: int) -> Tensor:
    """Return the rows, of ``count`` groups, that this rank's heads read; gradients of shared rows are summed."""
    mesh, here = _distributed(parameter).device_mesh, local(parameter)
    if _distributed(parameter).placements[0].is_shard():
        return here
    rows = here.shape[0] // count
    first = mesh.get_local_rank() * count // mesh.size() * rows
    return copied(here, mesh.get_group())[first : first + rows]


def local(parameter: Tensor) -> Tensor:
    """Return what this rank holds of a parameter."""
    return _distributed(parameter).to_local()


def whole(parameter: Tensor) -> Tensor:
    """Return all of a parameter on every rank; all ranks must call it."""
    return _distributed(parameter).full_tensor()


def _distributed(parameter: Tensor) -> DTensor:
    """Take a parameter for what it is: torch makes a DTensor of a DTensor's parameter."""
    return cast(DTensor, parameter)
