"""Put a layer over ranks in each form, and get whole results and gradients back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from m2gen.bench.ranks.entries import MICRO_BATCHES, PAIR
from m2gen.bench.ranks.kinds import Form


@dataclass(frozen=True)
class OverRanks:
    """A layer in one form."""

    call: Callable[..., Tensor]
    """The layer on what this rank has of x, and cu_seqlens of a packed batch."""
    module: nn.Module
    part: int
    """This rank's place among the ``parts`` of the tokens."""
    parts: int
    tokens: ProcessGroup | None
    """The ranks that have the other parts."""
    contributes: bool
    """Whether gradients of parameters are of this rank's tokens alone, to be summed."""
    whole: Callable[[], dict[str, Tensor]]
    """Gives the layer's state dict, whole on every rank."""

    def own(self, x: Tensor) -> Tensor:
        """Return this rank's tokens of x."""
        return x.chunk(self.parts, -2)[self.part]

    def joined(self, x: Tensor) -> Tensor:
        """Return the tokens of all ranks, of x that has this rank's."""
        if self.parts == 1:
            return x
        found = [torch.empty_like(x) for _ in range(self.parts)]
        distributed.all_gather(found, x.contiguous(), self.tokens)
        return torch.cat(found, -2)

    def sum_gradients(self) -> None:
        """Sum gradients over the ranks that have other tokens, those of one dtype at once."""
        if not self.contributes:
            return
        gradients = [_local(p.grad) for p in self.module.parameters() if p.grad is not None]
        for dtype in dict.fromkeys(x.dtype for x in gradients):
            same = [x for x in gradients if x.dtype == dtype]
            flat = torch.cat([x.flatten() for x in same])
            distributed.all_reduce(flat, group=self.tokens)
            for x, summed in zip(same, torch.split(flat, [x.numel() for x in same]), strict=True):
                x.copy_(summed.view_as(x))

    def gradients(self) -> dict[str, Tensor]:
        """Return the whole gradients of parameters by their names in the layer; parameters hold them thereafter."""
        with torch.no_grad():
            for parameter in self.module.parameters():
                assert parameter.grad is not None
                parameter.copy_(parameter.grad)
        return {name: x.detach().clone() for name, x in self.whole().items()}


def over_ranks(form: Form, layer: Any, parallel: ModuleType) -> OverRanks:
    """Put a layer over all ranks; raises ValueError, the same on every rank, for one that does not fit them."""
    world, rank, ranks = distributed.group.WORLD, distributed.get_rank(), distributed.get_world_size()
    kind = layer.state_weight.device.type
    if form is Form.ONE:
        return OverRanks(layer, layer, 0, 1, None, False, layer.state_dict)
    if form in (Form.HEADS, Form.HEADS_TOKENS):
        outside = form is Form.HEADS_TOKENS
        sharded = parallel.HeadParallelM2RNN(layer, init_device_mesh(kind, (ranks,)), sequence_parallel=outside)
        part, parts = (rank, ranks) if outside else (0, 1)
        return OverRanks(sharded, sharded, part, parts, world, False, sharded.gathered_state_dict)
    if form is Form.EXCHANGE:
        return OverRanks(parallel.HeadExchange(layer, world), layer, rank, ranks, world, True, layer.state_dict)
    if form is Form.PIPELINE:

        def handed(x: Tensor) -> Tensor:
            y: Tensor = parallel.scan_over_ranks(layer, x, world, min(MICRO_BATCHES, x.shape[0]))
            return y

        return OverRanks(handed, layer, rank, ranks, world, True, layer.state_dict)
    if ranks % PAIR:
        raise ValueError(f"pairs of ranks must share heads, got {ranks} ranks")
    mesh = init_device_mesh(kind, (ranks // PAIR, PAIR), mesh_dim_names=("tokens", "heads"))
    sharded = parallel.HeadParallelM2RNN(layer, mesh["heads"])
    group, place = mesh["tokens"].get_group(), mesh["tokens"].get_local_rank()
    exchange = parallel.HeadExchange(sharded, group)
    return OverRanks(exchange, sharded, place, ranks // PAIR, group, True, sharded.gathered_state_dict)


def _local(x: Tensor) -> Tensor:
    found: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return found
