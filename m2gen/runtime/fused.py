"""The layer by kernels of its own between the projections, where these compute what its modules would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import functional as F

from . import built, checks, library
from .convolution import DepthwiseConv1d
from .gate import DecayGate
from .layer_states import last_inputs
from .mixer import Mixer, known, operand_sizes, split_sizes
from .norm import RMSNorm
from .offsets import check_host_offsets
from .operands import check_beside

WIDEST = 4
"""Columns of the widest convolution that the kernels have."""
LEAST_TOKENS = 512
"""Tokens from which the input projection's weight is laid out anew: of fewer, its product takes less than the copy."""
ROW = 16
"""Elements, of 16 bits or more, whose multiples rows of the projection are, so that every load is aligned."""
_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_DEVICES = ("cuda", "cpu", "meta")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Projected(NamedTuple):
    """Rows of the input projection, and the first columns of the gate's inputs and of the output gates."""

    rows: Tensor
    gate: int
    output_gate: int

    def parts(self, layer: Mixer) -> tuple[Tensor, Tensor, Tensor]:
        """Return the columns of the convolution, of the gate's inputs and of the output gates."""
        mixed, forget, gates = split_sizes(layer)
        sizes = [mixed, forget, gates] if self.gate < self.output_gate else [mixed, gates, forget]
        first, second, third, _ = torch.split(self.rows, [*sizes, self.rows.shape[-1] - sum(sizes)], -1)
        return (first, second, third) if self.gate < self.output_gate else (first, third, second)


def serves(layer: Mixer, x: Tensor) -> bool:
    """Whether the layer's kernels compute what its modules would: these are as an ``M2RNN`` makes them, unwatched."""
    if not _reads_projection(layer, x) or layer.activation not in ("silu", "swish", None):
        return False
    if layer.forget_inputs != layer.heads.f or layer.gate_heads != layer.total_heads:
        return False
    if (layer.state_expansion, layer.head_dim, *layer.heads[:4]) not in built.LAYER_KERNELS:
        return False
    dtype = _dtype(x)
    if dtype not in _DTYPES or not (_key(layer, dtype, False) or (_key(layer, dtype, True) and not layer.round_gate)):
        return False
    conv, norm = layer.conv1d, layer.g_norm
    if conv is not None and not (_plain(conv, DepthwiseConv1d) and (layer.conv_width or 1) <= WIDEST):
        return False
    if not (_plain(norm, RMSNorm) or _plain(norm, nn.Identity)):
        return False
    return _calls_as_it_is(layer.decay_gate) and all(_is_there(p, x) for p in _read(layer))


def _reads_projection(layer: Mixer, x: Tensor) -> bool:
    """Whether a call may read the input projection's weight in place of calling the module."""
    if not getattr(layer, "fused", False) or layer.backend != "kernels" or x.device.type not in _DEVICES:
        return False
    module = layer.input_projection
    return _plain(module, nn.Linear) and all(_is_there(p, x) for p in module.parameters())


def _calls_as_it_is(gate: nn.Module) -> bool:
    """Whether the gate's module, which is called, gives what it is asked for: FSDP only brings its parameters."""
    return _plain(gate, DecayGate) or (isinstance(gate, DecayGate) and hasattr(gate, "unshard"))


def _read(layer: Mixer) -> Iterator[Tensor]:
    """Yield the parameters beside the projection's that are read, rather than used by a module that is called."""
    for module in (layer.conv1d, layer.g_norm):
        if module is not None:
            yield from module.parameters()
    yield layer.state_weight
    if layer.D is not None:
        yield layer.D


def _is_there(p: Tensor, x: Tensor) -> bool:
    """Whether a parameter is a plain tensor beside x, not a share of one, a packed one, or one that is elsewhere."""
    return type(p) in _TENSORS and p.device == x.device and p.numel() > 0


def _dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of what a projection makes of x."""
    kind = x.device.type
    autocasts = kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocasts else x.dtype


def _key(layer: Mixer, dtype: torch.dtype, computes_gate: bool) -> bool:
    heads = tuple(layer.heads)  # torch.compile of torch 2.11 finds no key that holds a NamedTuple
    return (layer.state_expansion, layer.head_dim, heads, dtype, computes_gate) in built.VARIANTS


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this class itself, with nothing that wants to see its calls."""
    watched = "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)
    return type(module) is kind and not watched


def project(layer: Mixer, x: Tensor) -> Projected:
    """Return the input projection of x, for many tokens with its rows aligned and the gate's inputs at their ends.

    Products of matrices whose rows are no multiples of 16 bytes take several times as long. A projection that must be
    called is, and may have any number of columns more.
    """
    mixed, forget, gates = split_sizes(layer)
    if not _lays_out(layer, x):
        return Projected(layer.input_projection(x), mixed, mixed + forget)
    module = cast(nn.Linear, layer.input_projection)
    weight, bias = module.weight, module.bias
    dtype = _dtype(x)
    rows = _laid_out(weight.to(dtype), (mixed, forget, gates))
    return Projected(
        F.linear(x, rows, None if bias is None else _laid_out(bias.to(dtype), (mixed, forget, gates))),
        mixed + gates, mixed,
    )  # fmt: skip


def _lays_out(layer: Mixer, x: Tensor) -> bool:
    """Whether the weight of the input projection is laid out anew for a call."""
    many = torch.compiler.is_compiling() or not known(x[..., 0].numel() < LEAST_TOKENS)
    return many and _reads_projection(layer, x)


def _laid_out(weight: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """Return rows of the convolution, of the output gates, of the gate's inputs, and zeros up to a multiple."""
    mixed, forget, gates = torch.split(weight, list(sizes))
    rest = -sum(sizes) % ROW
    return torch.cat((mixed, gates, forget, weight.new_zeros(rest, *weight.shape[1:])))


def scan(
    layer: Mixer,
    x: Tensor,
    conv: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what ``M2RNN.scan`` does, where ``serves`` says that the kernels do."""
    check_host_offsets(cu_seqlens, cu_seqlens_cpu)
    check_beside("m2rnn", x, {"conv": conv, "initial_state": state, "cu_seqlens": cu_seqlens})
    rows, gate, output_gate = project(layer, x)
    forget = rows[..., gate : gate + layer.heads.f]
    _, A_log, dt_bias = layer.decay_gate(forget.detach(), True)
    module, norm = layer.conv1d, layer.g_norm
    channels, back = sum(operand_sizes(layer)), (layer.conv_width or 1) - 1
    before = None if conv is None or not back else conv.to(rows.dtype)
    dims = (layer.state_expansion, layer.head_dim, *layer.heads)
    normed = isinstance(norm, RMSNorm)
    out, after, _, _ = library.OPERATORS.LAYER(
        rows, None if module is None else module.weight, None if module is None else module.bias, layer.state_weight,
        A_log, dt_bias, layer.D, norm.weight if normed else None, before, None if state is None else state.float(),
        cu_seqlens, cu_seqlens_cpu, list(dims), [gate, output_gate], layer.activation is not None, layer.round_gate,
        not _key(layer, rows.dtype, False), normed, norm.eps if normed else 0.0, checks.checked_bound(layer.clip),
        False, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    last = last_inputs(rows, before, cu_seqlens, channels, back)
    return layer.output_projection(out), last, after
