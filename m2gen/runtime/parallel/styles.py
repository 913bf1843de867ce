"""Styles of ``parallelize_module`` for the layer: how its heads, or its tokens, lie over a mesh."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from ..cache import M2RNNCache, States
from ..forward import run
from ..layer import M2RNN
from ..mixer import Mixer
from .agreement import check_calls_agree, check_ranks_agree
from .exchange import HeadExchange
from .heads import HeadParallelM2RNN
from .sequence import pipelined


class M2RNNHeads(ParallelStyle):
    """Shard the heads of an ``M2RNN``, which becomes a ``HeadParallelM2RNN`` in its place.

    x may be a DTensor of any placement, or what this rank has of one that is replicated, or with ``sequence_parallel``
    sharded by tokens, which ranks must divide. The result is as x should be, a DTensor without ``use_local_output``.

    Raises what ``HeadParallelM2RNN`` raises, and TypeError for a module that is no ``M2RNN``.
    """

    def __init__(self, *, sequence_parallel: bool = False, use_local_output: bool = True) -> None:
        self.sequence_parallel, self.use_local_output = sequence_parallel, use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is not M2RNN:
            raise TypeError(f"M2RNN: heads must be of an M2RNN to be sharded, got {type(module).__name__}")
        made = HeadParallelM2RNN(module, device_mesh, self.sequence_parallel).train(module.training)
        hooks = {name: value for name, value in vars(module).items() if "_hooks" in name}
        module.__dict__ = {**vars(made), **hooks}
        object.__setattr__(module, "__class__", HeadParallelM2RNN)  # since what a style returns for a child is dropped
        sharded = self.sequence_parallel
        _Placed(device_mesh, sharded=sharded, uneven=False, local=self.use_local_output).watch(module)
        return module


class M2RNNContext(ParallelStyle):
    """Run an ``M2RNN`` on sequences that lie over a mesh: its tokens are exchanged for heads, and back.

    With ``micro_batches`` states go from rank to rank instead, as ``scan_over_ranks`` says. Parameters stay as they
    are, whole on every rank or sharded by FSDP; each rank contributes to their gradients, whose sum is the batch's.

    x may be a DTensor of any placement, or this rank's tokens; the result is of these, a DTensor without
    ``use_local_output``, for which parts of unequal lengths must be those that torch makes, and be said by ``tokens``.
    A call takes ``cu_seqlens`` (of the whole batch) and ``cu_seqlens_cpu``, and neither a cache nor a mask. A
    ``HeadParallelM2RNN`` of another mesh does as well as an ``M2RNN``.

    Raises what ``HeadExchange`` raises, and TypeError for a module that is neither.
    """

    def __init__(self, *, micro_batches: int | None = None, use_local_output: bool = True) -> None:
        self.micro_batches, self.use_local_output = micro_batches, use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, M2RNN | HeadParallelM2RNN):
            raise TypeError(f"M2RNN: tokens must be of an M2RNN to lie over ranks, got {type(module).__name__}")
        group = device_mesh.get_group()
        if module.backend == "kernels":
            check_ranks_agree(group)
        call = HeadExchange(module, group) if self.micro_batches is None else _Piped(module, group, self.micro_batches)
        vars(module)["forward"] = partial(_forward_of_tokens, call)  # no closure: a copy of the layer calls itself
        _Placed(device_mesh, sharded=True, uneven=True, local=self.use_local_output).watch(module)
        return module


class _Piped:
    """``scan_over_ranks`` of one layer and group."""

    def __init__(self, layer: Mixer, group: ProcessGroup, micro_batches: int) -> None:
        self.layer, self.group, self.micro_batches = layer, group, micro_batches

    def __deepcopy__(self, memo: dict[int, Any]) -> _Piped:
        return _Piped(copy.deepcopy(self.layer, memo), self.group, self.micro_batches)

    def __call__(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """Do what ``scan_over_ranks`` does, which takes any ``tokens``."""
        if cu_seqlens is not None or cu_seqlens_cpu is not None:
            raise ValueError("M2RNN: cu_seqlens must be None with micro_batches, which are of whole sequences")
        return pipelined(self.layer, self._scan, x, self.group, self.micro_batches)

    def _scan(self, x: Tensor, conv: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return run(self.layer, x, States(conv, state))


def _forward_of_tokens(
    call: Callable[..., Tensor],
    x: Tensor,
    cache: M2RNNCache | None = None,
    attention_mask: Tensor | None = None,
    *packing: Tensor | None,
    **named: Any,
) -> Tensor:
    """Be a forward with the layer's arguments of a call that has no cache and no mask."""
    for name, given in (("cache", cache), ("attention_mask", attention_mask)):
        if given is not None:
            raise ValueError(f"M2RNN: {name} must be None where tokens lie over ranks; pack with cu_seqlens")
    return call(x, *packing, **named)


class _Placed:
    """Brings x to its placement before calls of a module, and makes its results DTensors unless they stay ``local``.

    Where parts of x may be ``uneven``, the call is told which rank has how many tokens, unless they have equal ones.
    """

    def __init__(self, mesh: DeviceMesh, *, sharded: bool, uneven: bool, local: bool) -> None:
        self.mesh, self.sharded, self.uneven, self.local = mesh, sharded, uneven, local

    def __deepcopy__(self, memo: dict[int, Any]) -> _Placed:
        return self  # of a copied module the same: a mesh is not copied

    def watch(self, module: nn.Module) -> None:
        """Have the module's calls come by here."""
        module.register_forward_pre_hook(self._enter, with_kwargs=True)
        if not self.local:
            module.register_forward_hook(self._leave, with_kwargs=True)

    def _enter(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0] if args else kwargs.get("x")
        tokens = self._tokens(x) if self.sharded and isinstance(x, DTensor) else None
        if self.uneven and not self.local and isinstance(x, Tensor):
            self._check_parts(x, tokens or kwargs.get("tokens"))
        placed = {name: self._here(value, value is x) for name, value in kwargs.items()}
        return tuple(self._here(value, value is x) for value in args), placed | ({"tokens": tokens} if tokens else {})

    def _here(self, value: Any, is_x: bool) -> Any:
        """Return what this rank is to have of an argument, of any but x all."""
        if not isinstance(value, DTensor):
            return value
        return value.redistribute(self.mesh, self._placements(value) if is_x else [Replicate()]).to_local()

    def _placements(self, x: Tensor) -> Sequence[Shard | Replicate]:
        return [Shard(x.dim() - 2) if self.sharded else Replicate()]

    def _tokens(self, x: Tensor) -> tuple[int, ...] | None:
        """Return how many tokens of x ranks get, as torch shards it; None for equal numbers."""
        ranks, total = self.mesh.size(), x.shape[-2]
        if total % ranks == 0:
            return None
        if not self.uneven:
            raise ValueError(f"M2RNN: tokens of x must be divided by {ranks} ranks with sequence_parallel, got {total}")
        return self._parts(total)

    def _parts(self, total: int) -> tuple[int, ...]:
        """Return how many tokens ranks get of so many, as torch shards them."""
        each, ranks = -(-total // self.mesh.size()), range(self.mesh.size())
        return tuple(max(min(each, total - each * rank), 0) for rank in ranks)

    def _check_parts(self, x: Tensor, tokens: Sequence[int] | None) -> None:
        """Refuse parts of x that no DTensor can be made of: those of unequal lengths, unless as torch shards them."""
        if tokens is not None:
            if tuple(tokens) != self._parts(sum(tokens)):
                expected = f"{self._parts(sum(tokens))} without use_local_output, as torch shards them"
                raise ValueError(f"M2RNN: tokens must be {expected}, got {tuple(tokens)}")
        elif not isinstance(x, DTensor):
            facts = {"tokens of x, where none are said,": str(x.shape[-2])}
            check_calls_agree(self.mesh.get_group(), "placed", x.shape, lambda: facts)

    def _leave(self, _: nn.Module, __: Any, kwargs: dict[str, Any], y: Any) -> Any:
        if not isinstance(y, Tensor):
            return y
        place, tokens = self._placements(y), kwargs.get("tokens")
        if tokens is None:
            return DTensor.from_local(y, self.mesh, place, run_check=False)
        shape = torch.Size((*y.shape[:-2], sum(tokens), y.shape[-1]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(y, self.mesh, place, run_check=False, shape=shape, stride=stride)
