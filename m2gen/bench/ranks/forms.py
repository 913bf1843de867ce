"""Put a layer or a hybrid over ranks in each form, and get whole results and gradients back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from m2gen.bench.ranks.entries import MICRO_BATCHES, PAIR
from m2gen.bench.ranks.hybrid import Hybrid
from m2gen.bench.ranks.kinds import Form


@dataclass(frozen=True)
class ForRanks:
    """What a generated package has for several ranks."""

    parallel: ModuleType
    sharding: ModuleType


@dataclass(frozen=True)
class OverRanks:
    """A layer or model in one form."""

    call: Callable[..., Tensor]
    """The layer on what this rank has of x, and cu_seqlens of a packed batch."""
    module: nn.Module
    whole: Callable[[], dict[str, Tensor]]
    """Gives the state dict of what it was made of, whole on every rank."""
    part: int = 0
    """This rank's place among the ``parts`` of the tokens, or of the sequences."""
    parts: int = 1
    others: ProcessGroup | None = None
    """The ranks that have the other parts."""
    contributes: bool = False
    """Whether gradients of parameters are of this rank's part alone, to be summed."""
    dim: int = -2
    """The dim of x that parts are of: tokens, or 0 for sequences."""
    averaged: int = 1
    """Ranks over which gradients are means where they should be sums."""

    def own(self, x: Tensor) -> Tensor:
        """Return this rank's part of x."""
        return x.chunk(self.parts, self.dim)[self.part]

    def joined(self, x: Tensor) -> Tensor:
        """Return the parts of all ranks, of x that is this rank's."""
        if self.parts == 1:
            return x
        found = [torch.empty_like(x) for _ in range(self.parts)]
        distributed.all_gather(found, x.contiguous(), self.others)
        return torch.cat(found, self.dim)

    def sum_gradients(self) -> None:
        """Sum gradients over the ranks that have other tokens, those of one dtype at once."""
        if not self.contributes:
            return
        gradients = [_local(p.grad) for p in self.module.parameters() if p.grad is not None]
        for dtype in dict.fromkeys(x.dtype for x in gradients):
            same = [x for x in gradients if x.dtype == dtype]
            flat = torch.cat([x.flatten() for x in same])
            distributed.all_reduce(flat, group=self.others)
            for x, summed in zip(same, torch.split(flat, [x.numel() for x in same]), strict=True):
                x.copy_(summed.view_as(x))

    def gradients(self) -> dict[str, Tensor]:
        """Return the whole gradients of parameters by their first names; parameters hold them thereafter."""
        with torch.no_grad():
            for parameter in self.module.parameters():
                assert parameter.grad is not None
                parameter.copy_(parameter.grad)
        return {name: x.detach().clone() * self.averaged for name, x in self.whole().items()}


def over_ranks(form: Form, layer: Any, package: ForRanks) -> OverRanks:
    """Put a layer over all ranks; raises ValueError, the same on every rank, for one that does not fit them."""
    world, rank, ranks = distributed.group.WORLD, distributed.get_rank(), distributed.get_world_size()
    kind = next(layer.parameters()).device.type
    parallel = package.parallel
    if form is Form.ONE:
        return OverRanks(layer, layer, layer.state_dict)
    if form is Form.FSDP:
        return _sharded(layer, package.sharding)
    if form in (Form.HEADS, Form.HEADS_TOKENS):
        outside = form is Form.HEADS_TOKENS
        sharded = parallel.HeadParallelM2RNN(layer, init_device_mesh(kind, (ranks,)), sequence_parallel=outside)
        parts = (rank, ranks) if outside else (0, 1)
        return OverRanks(sharded, sharded, sharded.gathered_state_dict, *parts, world)
    if form is Form.EXCHANGE:
        exchange = parallel.HeadExchange(layer, world)
        return OverRanks(exchange, layer, layer.state_dict, rank, ranks, world, contributes=True)
    if form is Form.PIPELINE:

        def handed(x: Tensor) -> Tensor:
            y: Tensor = parallel.scan_over_ranks(layer, x, world, min(MICRO_BATCHES, x.shape[0]))
            return y

        return OverRanks(handed, layer, layer.state_dict, rank, ranks, world, contributes=True)
    if ranks % PAIR:
        raise ValueError(f"pairs of ranks must share heads, got {ranks} ranks")
    mesh = init_device_mesh(kind, (ranks // PAIR, PAIR), mesh_dim_names=("tokens", "heads"))
    sharded = parallel.HeadParallelM2RNN(layer, mesh["heads"])
    group, place = mesh["tokens"].get_group(), mesh["tokens"].get_local_rank()
    exchange = parallel.HeadExchange(sharded, group)
    return OverRanks(exchange, sharded, sharded.gathered_state_dict, place, ranks // PAIR, group, contributes=True)


def _sharded(model: Hybrid, sharding: ModuleType) -> OverRanks:
    """Shard every block, whose parameters are there only while it runs, and decay parameters in float32."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks,))
    sharding.fully_shard_decay(model, mesh=mesh)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)

    def whole() -> dict[str, Tensor]:
        return {name: cast(DTensor, p).full_tensor() for name, p in model.named_parameters()}

    return OverRanks(model, model, whole, rank, ranks, distributed.group.WORLD, dim=0, averaged=ranks)


def _local(x: Tensor) -> Tensor:
    found: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return found
