"""Styles of ``parallelize_module`` for the layer: how its heads, or its tokens, lie over a mesh."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from ..cache import M2RNNCache, States
from ..forward import run
from ..layer import M2RNN
from ..mixer import Mixer
from .exchange import HeadExchange
from .heads import HeadParallelM2RNN
from .sequence import pipelined


class M2RNNHeads(ParallelStyle):
    """Shard the heads of an ``M2RNN``, which becomes a ``HeadParallelM2RNN`` in its place.

    x may be a DTensor of any placement, or what this rank has of one that is replicated, or with ``sequence_parallel``
    sharded by tokens. The result is as x should be, a DTensor without ``use_local_output``.

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
        _place_tokens(module, device_mesh, sharded=self.sequence_parallel, local=self.use_local_output)
        return module


class M2RNNContext(ParallelStyle):
    """Run an ``M2RNN`` on sequences that lie over a mesh: its tokens are exchanged for heads, and back.

    With ``micro_batches`` states go from rank to rank instead, as ``scan_over_ranks`` says. Parameters stay as they
    are, whole on every rank or sharded by FSDP; each rank contributes to their gradients, whose sum is the batch's.

    x may be a DTensor of any placement, or this rank's tokens; the result is of these, a DTensor without
    ``use_local_output``. A call takes ``cu_seqlens`` (of the whole batch) and ``cu_seqlens_cpu``, and neither a cache
    nor a mask. A ``HeadParallelM2RNN`` of another mesh does as well as an ``M2RNN``.

    Raises what ``HeadExchange`` raises, and TypeError for a module that is neither.
    """

    def __init__(self, *, micro_batches: int | None = None, use_local_output: bool = True) -> None:
        self.micro_batches, self.use_local_output = micro_batches, use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, M2RNN | HeadParallelM2RNN):
            raise TypeError(f"M2RNN: tokens must be of an M2RNN to lie over ranks, got {type(module).__name__}")
        group = device_mesh.get_group()
        call = HeadExchange(module, group) if self.micro_batches is None else _Piped(module, group, self.micro_batches)
        vars(module)["forward"] = partial(_forward_of_tokens, call)  # no closure: a copy of the layer calls itself
        _place_tokens(module, device_mesh, sharded=True, local=self.use_local_output)
        return module


class _Piped:
    """``scan_over_ranks`` of one layer and group."""

    def __init__(self, layer: Mixer, group: ProcessGroup, micro_batches: int) -> None:
        self.layer, self.group, self.micro_batches = layer, group, micro_batches

    def __deepcopy__(self, memo: dict[int, Any]) -> _Piped:
        return _Piped(copy.deepcopy(self.layer, memo), self.group, self.micro_batches)

    def __call__(self, x: Tensor, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None) -> Tensor:
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
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Tensor:
    """Be a forward with the layer's arguments of a call that has no cache and no mask."""
    for name, given in (("cache", cache), ("attention_mask", attention_mask)):
        if given is not None:
            raise ValueError(f"M2RNN: {name} must be None where tokens lie over ranks; pack with cu_seqlens")
    return call(x, cu_seqlens, cu_seqlens_cpu)


def _place_tokens(module: nn.Module, mesh: DeviceMesh, *, sharded: bool, local: bool) -> None:
    """Bring x to its placement before calls of a module, and make its results DTensors unless they stay ``local``."""

    def placements(x: Tensor) -> Sequence[Shard | Replicate]:
        return [Shard(x.dim() - 2) if sharded else Replicate()]

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(at_home, args)), {name: at_home(value) for name, value in kwargs.items()}

    def at_home(x: Any) -> Any:
        return x.redistribute(mesh, placements(x)).to_local() if isinstance(x, DTensor) else x

    def leave(_: nn.Module, __: Any, y: Any) -> Any:
        return DTensor.from_local(y, mesh, placements(y), run_check=False) if isinstance(y, Tensor) else y

    module.register_forward_pre_hook(enter, with_kwargs=True)
    if not local:
        module.register_forward_hook(leave)
