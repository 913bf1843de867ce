"""The layer with its heads sharded over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from .. import fused
from ..cache import NUMBERS, M2RNNCache, States, allocate_cache
from ..convolution import DepthwiseConv1d
from ..facts import Backend, HeadCounts
from ..forward import check_tokens, run
from ..gate import DecayGate
from ..layer import M2RNN
from ..mixer import Device, operand_sizes
from ..norm import RMSNorm
from ..not_built import check_built
from ..optimizer import mark_no_weight_decay
from .agreement import check_calls_agree, check_ranks_agree, offsets_of
from .children import OwnConvolution, OwnGate, OwnLinear, OwnNorm, OwnOutput, OwnWeight
from .normed import dims_of
from .shards import local, sharded, whole
from .share import share, share_inputs


class HeadParallelM2RNN(nn.Module):
    """An ``M2RNN`` with heads sharded over the ranks of a 1-D ``mesh``; x and the result are whole on every rank.

    With ``sequence_parallel`` each rank has its equal part of the tokens outside instead, in the order of ranks: of
    each sequence, x (B, S / R, hidden_size), or of a packed batch, (T / R, hidden_size) with the offsets of all of it.
    They are gathered before the input projection, and the output projection's sums are scattered.

    Rank r of R runs heads r N / R up to (r + 1) N / R. A role (q, k, v, f, w or g) whose heads R divides is sharded;
    one whose heads divide R is replicated, and a rank uses the one group that its heads read. Parameters are DTensors
    made of the ``layer``'s, a rank's own rows being all that it holds of sharded ones; ``gathered_state_dict`` gives
    the layer's own again.

    The values are those of the first rank's ``layer``. Raises ValueError for heads that do not fit the ranks,
    VariantNotBuiltError where a rank's share was not built, RanksDifferError, and TypeError for a layer with a child of
    another class, whose parameters may not be all that it computes with: adapters must be merged first.
    """

    plain_children: ClassVar[Mapping[str, type[nn.Module]]] = {
        "conv1d": OwnConvolution, "decay_gate": OwnGate, "shared": OwnWeight,
    }  # fmt: skip
    parameter_kinds: ClassVar[tuple[type, ...]] = (DTensor,)

    def __init__(self, layer: M2RNN, mesh: DeviceMesh, sequence_parallel: bool = False) -> None:
        super().__init__()
        _check_children(layer)
        ranks, counts = mesh.size(), {**layer.heads._asdict(), "g": layer.gate_heads}
        own = share(counts, ranks)
        self.mesh, self.gate_heads, self.number = mesh, own.pop("g"), next(NUMBERS)
        self.sequence_parallel = sequence_parallel
        self.heads, self.total_heads = HeadCounts(**own), layer.total_heads // ranks
        if layer.backend == "kernels":
            check_ranks_agree(mesh.get_group())  # first: a rank with another package may not have the share
            check_built(layer.state_expansion, layer.head_dim, self.heads, layer.state_weight.dtype)
        self.hidden_size, self.state_expansion, self.head_dim = layer.hidden_size, layer.state_expansion, layer.head_dim
        self.forget_inputs = share_inputs(layer.forget_inputs, ranks)
        self.conv_width, self.clip = layer.conv_width, layer.clip
        self.activation, self.round_gate = layer.activation, layer.round_gate
        self.backend: Backend = layer.backend
        self.fused = layer.fused
        self._share_children(layer, counts)

    def _share_children(self, layer: M2RNN, counts: Mapping[str, int]) -> None:
        """Make the children of this rank's heads, of which there are ``counts`` by role on all ranks."""
        mesh = self.mesh
        sizes = dict(zip("qkv", operand_sizes(layer), strict=True))
        wide = {**sizes, "f": layer.forget_inputs, "g": layer.gate_heads * layer.head_dim}
        projected = {**counts, "f": layer.forget_inputs}
        self.input_projection = OwnLinear(layer.input_projection, wide, projected, mesh)
        self.input_projection.scatters = self.sequence_parallel
        self.conv1d = None if layer.conv1d is None else OwnConvolution(layer.conv1d, sizes, counts, mesh)
        self.decay_gate = OwnGate(layer.decay_gate, counts["f"], mesh)
        self.shared = OwnWeight(layer, {"w": layer.heads.w}, counts, mesh, name="state_weight")
        self.skip = None if layer.D is None else sharded(layer.D, mesh, Shard(0))
        norm = OwnNorm(layer.g_norm, mesh) if isinstance(layer.g_norm, RMSNorm) else None
        self.g_norm = nn.Identity()  # the output projection has it
        self.output_projection = OwnOutput(layer.output_projection, norm, mesh, self.sequence_parallel)
        self.output_projection.dims = dims_of(self)
        mark_no_weight_decay(self)

    @property
    def state_weight(self) -> Tensor:
        """The weights that this rank's heads read."""
        rows: Tensor = self.shared()
        return rows

    @property
    def D(self) -> Tensor | None:
        """This rank's rows of D, None for a layer without."""
        return None if self.skip is None else local(self.skip)

    def forward(
        self,
        x: Tensor,
        cache: M2RNNCache | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> Tensor:
        """Do what ``M2RNN.forward`` does; a cache (``allocate_cache`` of this module) holds this rank's heads.

        Raises ValueError for a cache or a mask where tokens lie over ranks: neither says whose tokens it is of.
        """
        if self.sequence_parallel and (attention_mask is not None or getattr(cache, "in_place", False)):
            given = "cache" if attention_mask is None else "attention_mask"
            raise ValueError(f"M2RNN: {given} must be None with sequence_parallel; pack sequences with cu_seqlens")

        def facts() -> dict[str, str]:
            """Name what decides on what is sent: modules that are called have gradients summed in another order."""
            check_tokens(self, x, cu_seqlens, cu_seqlens_cpu)
            dtype, offsets = str(fused.compute_dtype(x)), offsets_of(cu_seqlens, cu_seqlens_cpu)
            ran = "kernels" if fused.serves(self, x) else "modules"
            return {"shape of x": str(tuple(x.shape)), "dtype": dtype, "cu_seqlens": offsets, "what runs it": ran}

        check_calls_agree(self.mesh.get_group(), "heads", (x.dtype, tuple(x.shape[:-1])), facts)
        return run(self, x, cache, attention_mask, cu_seqlens, cu_seqlens_cpu)

    def scan(
        self,
        x: Tensor,
        conv: Tensor | None = None,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do what ``M2RNN.scan`` does, with the states of this rank's heads."""
        after: tuple[Tensor, Tensor, Tensor] = self(x, States(conv, state), None, cu_seqlens, cu_seqlens_cpu)
        return after

    def allocate_cache(
        self,
        batch_size: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> M2RNNCache:
        """Do what ``M2RNN.allocate_cache`` does, for this rank's heads."""
        return allocate_cache(self, batch_size, device, dtype, state_dtype)

    def gathered_state_dict(self) -> dict[str, Tensor]:
        """Return the state dict of the layer that this was made of, whole on every rank; all ranks must call it."""
        norm = self.output_projection.norm
        found = {
            **self.input_projection.gathered("input_projection"),
            **({} if self.conv1d is None else self.conv1d.gathered("conv1d")),
            **self.decay_gate.gathered("decay_gate"),
            "state_weight": self.shared.gathered("shared")["shared.weight"],
            **({} if self.skip is None else {"D": whole(self.skip)}),
            **({} if norm is None else {"g_norm.weight": whole(norm.weight)}),
            "output_projection.weight": whole(self.output_projection.weight),
        }
        return {name: x.detach() for name, x in found.items()}


_CHILDREN = {
    "input_projection": nn.Linear,
    "conv1d": DepthwiseConv1d,
    "decay_gate": DecayGate,
    "g_norm": RMSNorm,
    "output_projection": nn.Linear,
}
_ABSENT = (type(None), nn.Identity)
"""What may be in the place of a child that a layer was made without."""


def _check_children(layer: M2RNN) -> None:
    for name, kind in _CHILDREN.items():
        found = type(getattr(layer, name))
        if found is not kind and found not in _ABSENT:
            raise TypeError(f"M2RNN: {name} must be {kind.__name__} to be sharded, got {found.__name__}")
