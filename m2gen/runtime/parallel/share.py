"""How the heads of a layer are shared out over ranks, and a layer's share without parameters of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..convolution import DepthwiseConv1d, depthwise
from ..facts import HeadCounts
from ..gate import forget_gate
from ..mixer import Mixer, operand_sizes
from .children import OwnConvolution


def share(counts: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Return how many heads of each role one of ``ranks`` runs, of ``counts`` heads of a layer.

    Raises ValueError for heads that neither divide the ranks nor are divided by them.
    """
    for name, count in counts.items():
        if count % ranks and ranks % count:
            raise ValueError(f"M2RNN: heads of {name} must divide, or be divided by, {ranks} ranks, got {count}")
    total = max(counts.values())
    if total % ranks:
        raise ValueError(f"M2RNN: {total} heads must be divided by {ranks} ranks")
    return {name: max(count // ranks, 1) for name, count in counts.items()}


def share_inputs(inputs: int, ranks: int) -> int:
    """Return how many ``forget_inputs`` one of ``ranks`` reads; raises ValueError where they do not fit."""
    if inputs % ranks and ranks % inputs:
        raise ValueError(f"M2RNN: forget_inputs must divide, or be divided by, {ranks} ranks, got {inputs}")
    return max(inputs // ranks, 1)


@dataclass(frozen=True)
class RankOf:
    """One of several ranks."""

    rank: int
    ranks: int

    def first(self, count: int) -> int:
        """Return the first of ``count`` groups that the rank's heads read."""
        return self.rank * count // self.ranks


def rows_of(x: Tensor, count: int, place: RankOf) -> Tensor:
    """Return the rows of x, of ``count`` groups, that a rank's heads read."""
    rows = x.shape[0] // count
    return x[place.first(count) * rows :][: max(count // place.ranks, 1) * rows]


class HeadShare(nn.Module):
    """A ``Mixer`` of a rank's heads, between the projections of a layer, whose parameters it reads in each call.

    Raises TypeError for a layer with a convolution of another class, whose weight may not be all that it computes with.
    """

    def __init__(self, layer: Mixer, place: RankOf) -> None:
        super().__init__()
        self.heads = HeadCounts(**share(layer.heads._asdict(), place.ranks))
        self._layer = (layer,)  # no child, or its parameters would be here as well
        self.place = place
        self.total_heads, self.gate_heads = layer.total_heads // place.ranks, max(layer.gate_heads // place.ranks, 1)
        self.forget_inputs = share_inputs(layer.forget_inputs, place.ranks)
        self.hidden_size, self.state_expansion, self.head_dim = layer.hidden_size, layer.state_expansion, layer.head_dim
        self.conv_width, self.clip, self.backend = layer.conv_width, layer.clip, layer.backend
        self.activation, self.round_gate = layer.activation, layer.round_gate
        self.fused = getattr(layer, "fused", False)
        self.conv1d = None if _plain(layer.conv1d) is None else _Convolution(layer, place)
        self.decay_gate = _Gate(layer, place)
        self.input_projection = self.g_norm = self.output_projection = nn.Identity()

    @property
    def owner(self) -> Mixer:
        """The layer, whose children and parameters are read."""
        return self._layer[0]

    @property
    def state_weight(self) -> Tensor:
        """The weights that the rank's heads read."""
        (layer,) = self._layer
        return rows_of(layer.state_weight, layer.heads.w, self.place)

    @property
    def D(self) -> Tensor | None:
        """The rank's rows of D, None for a layer without."""
        (layer,) = self._layer
        return None if layer.D is None else rows_of(layer.D, layer.total_heads, self.place)


def _plain(conv1d: nn.Module | None) -> DepthwiseConv1d | OwnConvolution | None:
    if conv1d is None or isinstance(conv1d, DepthwiseConv1d | OwnConvolution):
        return conv1d
    raise TypeError(f"M2RNN: conv1d must be DepthwiseConv1d to be shared out, got {type(conv1d).__name__}")


class _Convolution(nn.Module):
    """The convolution of the channels that the rank's heads read."""

    def __init__(self, layer: Mixer, place: RankOf) -> None:
        super().__init__()
        self._layer, self.place = (layer,), place

    @property
    def weight(self) -> Tensor:
        """The rows of the weight."""
        weight = self._found.weight
        if isinstance(weight, DTensor):
            raise TypeError("M2RNN: conv1d must be sharded with its layer, which reads its rows, and not by itself")
        return self._own(weight)

    @property
    def bias(self) -> Tensor | None:
        """The rows of the bias, None without one."""
        bias = self._found.bias
        return None if bias is None else self._own(bias)

    @property
    def _found(self) -> DepthwiseConv1d | OwnConvolution:
        found = _plain(self._layer[0].conv1d)
        assert found is not None
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Do what ``DepthwiseConv1d.forward`` does."""
        return depthwise(x, self.weight, self.bias)

    def _own(self, x: Tensor) -> Tensor:
        (layer,) = self._layer
        roles = zip(torch.split(x, list(operand_sizes(layer))), layer.heads, strict=False)
        return torch.cat([rows_of(part, count, self.place) for part, count in roles])


class _Gate(nn.Module):
    """The forget gates that the rank's heads read."""

    def __init__(self, layer: Mixer, place: RankOf) -> None:
        super().__init__()
        self._layer, self.place = (layer,), place

    def forward(self, x: Tensor, in_kernel: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Do what ``DecayGate.forward`` does."""
        (layer,) = self._layer
        _, A_log, dt_bias = layer.decay_gate(x, True)  # as a module, whose hooks gather what is sharded
        A_log, dt_bias = (rows_of(p, layer.heads.f, self.place) for p in (A_log, dt_bias))
        return forget_gate(A_log, dt_bias, x, in_kernel)
