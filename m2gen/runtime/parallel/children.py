"""The children of a layer whose heads are sharded: each holds what this rank's heads read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from ..convolution import depthwise
from ..fused import compute_dtype, laid_out
from ..gate import DecayGate, WideParameters, forget_gate
from ..norm import RMSNorm
from .collectives import scattered, summed
from .normed import Normed, scaled, squared
from .products import by_columns, by_rows
from .shards import local, own, placement, sharded, whole


class Roles(nn.ParameterDict):
    """Parameters by role, all of one of the groups of ``parameter_groups``."""

    def __init__(self, parts: Mapping[str, nn.Parameter], group: str) -> None:
        super().__init__(parts)
        self.parameter_group = group


class OwnRows(nn.Module):
    """Rows of a weight and a bias, role by role: ``weight`` and ``bias`` are what this rank's heads read."""

    weights_group = "others"

    def __init__(
        self,
        module: nn.Module,
        sizes: Mapping[str, int],
        counts: Mapping[str, int],
        mesh: DeviceMesh,
        name: str = "weight",
    ) -> None:
        super().__init__()
        self.mesh, self.counts = mesh, {role: counts[role] for role in sizes}
        self.weights = Roles(self._sharded(getattr(module, name), sizes), self.weights_group)
        self.biases = Roles(self._sharded(getattr(module, "bias", None), sizes), "undecayed")

    def _sharded(self, full: Tensor | None, sizes: Mapping[str, int]) -> dict[str, nn.Parameter]:
        parts: dict[str, nn.Parameter] = {}
        if full is not None:
            for role, rows in zip(sizes, torch.split(full, list(sizes.values())), strict=True):
                parts[role] = sharded(rows, self.mesh, placement(self.counts[role], self.mesh), full.requires_grad)
        return parts

    @property
    def weight(self) -> Tensor:
        """The rows of the weight."""
        return self._own(self.weights)

    @property
    def bias(self) -> Tensor | None:
        """The rows of the bias, None without one."""
        return self._own(self.biases) if len(self.biases) else None

    def _own(self, parts: nn.ParameterDict) -> Tensor:
        return torch.cat(own([parts[role] for role in self.counts], list(self.counts.values())))

    def gathered(self, prefix: str) -> dict[str, Tensor]:
        """Return the whole weight and bias under the names that they have in the layer."""
        kinds = {f"{prefix}.weight": self.weights, f"{prefix}.bias": self.biases}
        return {name: torch.cat([whole(p[r]) for r in self.counts]) for name, p in kinds.items() if len(p)}


class OwnWeight(OwnRows):
    """The recurrence's weight, which has no module of its own."""

    weights_group = "state_weights"

    def forward(self) -> Tensor:
        """Return what this rank's heads read."""
        return self.weight


class OwnLinear(OwnRows):
    """The input projection to what this rank's heads read; the gradient of x is summed over ranks."""

    weights_group = "matrices"
    scatters = False
    """Whether each rank has its part of the tokens alone."""
    lays_out = True
    """Says that rows of the result are as ``fused.laid_out`` has them."""

    def forward(self, x: Tensor) -> Tensor:
        """Project x (..., tokens, hidden_size), the same on every rank or its part of the tokens, to all tokens."""
        dtype = compute_dtype(x)
        bias = self._rows(self.biases, dtype) if len(self.biases) else None
        return by_rows(x.to(dtype), self._rows(self.weights, dtype), bias, self.scatters, self.mesh.get_group())

    def _rows(self, parts: nn.ParameterDict, dtype: torch.dtype) -> Tensor:
        *mixed, forget, gates = own([parts[role] for role in self.counts], list(self.counts.values()))
        return laid_out((*mixed, gates, forget)).to(dtype)


class OwnConvolution(OwnRows):
    """The convolution of the channels that this rank's heads read."""

    def forward(self, x: Tensor) -> Tensor:
        """Do what ``DepthwiseConv1d.forward`` does."""
        return depthwise(x, self.weight, self.bias)


class OwnGate(WideParameters):
    """The parameters of the forget gates that this rank's heads read."""

    parameter_group = "undecayed"

    def __init__(self, gate: DecayGate, count: int, mesh: DeviceMesh) -> None:
        super().__init__()
        self.count = count
        self.logs = sharded(gate.A_log, mesh, placement(count, mesh))
        self.biases = sharded(gate.dt_bias, mesh, placement(count, mesh))

    @property
    def A_log(self) -> Tensor:
        """What this rank's heads read of it."""
        return own([self.logs], [self.count])[0]

    @property
    def dt_bias(self) -> Tensor:
        """What this rank's heads read of it."""
        return own([self.biases], [self.count])[0]

    def forward(self, x: Tensor, in_kernel: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Do what ``DecayGate.forward`` does."""
        return forget_gate(self.A_log, self.dt_bias, x, in_kernel)

    def gathered(self, prefix: str) -> dict[str, Tensor]:
        """Return both whole, under the names that they have in the layer."""
        return {f"{prefix}.A_log": whole(self.logs), f"{prefix}.dt_bias": whole(self.biases)}


class OwnNorm(nn.Module):
    """``RMSNorm`` over the heads of every rank, as columns of the output projection, and a token's scale after it."""

    parameter_group = "undecayed"

    def __init__(self, norm: RMSNorm, mesh: DeviceMesh) -> None:
        super().__init__()
        self.eps, self.size = norm.eps, norm.weight.numel()
        self.weight = sharded(norm.weight, mesh, Shard(0))

    def forward(self, columns: Tensor) -> Tensor:
        """Multiply this rank's columns of the output projection's weight by the norm's."""
        return (columns * local(self.weight)).to(columns.dtype)


class OwnOutput(nn.Module):
    """The output projection of this rank's heads, which the norm goes before, summed over ranks."""

    parameter_group = "matrices"

    def __init__(self, linear: nn.Linear, norm: OwnNorm | None, mesh: DeviceMesh, scatters: bool = False) -> None:
        super().__init__()
        self.mesh, self.scatters = mesh, scatters
        self.weight = sharded(linear.weight, mesh, Shard(1))
        self.norm = norm
        self.dims: tuple[int, ...] | None = None
        """What the kernels that scale its result are looked up by; None where PyTorch does."""

    def forward(self, x: Tensor) -> Tensor:
        """Project this rank's heads (..., tokens, channels) to the sum on every rank, or to its part of the tokens."""
        group, weight = self.mesh.get_group(), local(self.weight)
        if self.norm is None:
            return by_columns(x, weight.to(x.dtype), self.scatters, group)
        x, squares = squared(x)
        mixed = by_columns(x, self.norm(weight).to(x.dtype), self.scatters, group)
        total = scattered(squares, -2, group) if self.scatters else summed(squares, group)
        return scaled(mixed, total, Normed(self.norm.size, self.norm.eps, self.dims))
