"""The layer by kernels of its own between the projections, where these compute what its modules would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from . import built, checks, library
from .cache import States
from .gate import DecayGate
from .layer_states import last_inputs
from .mixer import Mixer, known, operand_sizes, split_sizes
from .norm import RMSNorm
from .offsets import check_host_offsets
from .operands import check_beside
from .room import ROW

WIDEST = 4
"""Columns of the widest convolution that the kernels have."""
LEAST_TOKENS = 512
"""Tokens from which the input projection's weight is laid out anew: of fewer, its product takes less than the copy."""
TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
"""Classes of parameters whose elements are all there."""
_DEVICES = ("cuda", "cpu", "meta")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels around the recurrence take."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Child = TypeVar("Child", bound=nn.Module)


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
    return (_lays_out_itself(layer) or reads_projection(layer, x)) and computes(layer, x)


def computes(layer: Mixer, x: Tensor) -> bool:
    """Whether the kernels compute what a layer's modules would of the rows of x's projection."""
    if not _may(layer, x) or layer.activation not in ("silu", "swish", None):
        return False
    if layer.forget_inputs != layer.heads.f or layer.gate_heads != layer.total_heads:
        return False
    if (layer.state_expansion, layer.head_dim, *layer.heads[:4]) not in built.LAYER_KERNELS:
        return False
    dtype = compute_dtype(x)
    if dtype not in DTYPES or not (_key(layer, dtype, False) or (_key(layer, dtype, True) and not layer.round_gate)):
        return False
    if layer.conv1d is not None and (layer.conv_width or 1) > WIDEST:
        return False
    norm, owner = layer.g_norm, getattr(layer, "owner", layer)  # of the children and parameters that a share reads
    if not (plain(norm, RMSNorm) or plain(norm, nn.Identity)):
        return False
    return all(_is_there(p, x) for p in norm.parameters()) and _is_read(owner, x)


def _may(layer: Mixer, x: Tensor) -> bool:
    """Whether kernels of the layer's own may be called at all, which what watches every module would not see."""
    wanted = bool(getattr(layer, "fused", False)) and layer.backend == "kernels" and x.device.type in _DEVICES
    return wanted and not _has_any_global_hook()  # type: ignore[no-untyped-call]


def reads_projection(layer: Mixer, x: Tensor) -> bool:
    """Whether a call may read the input projection's weight in place of calling the module."""
    module = layer.input_projection
    return _may(layer, x) and plain(module, nn.Linear) and all(_is_there(p, x) for p in module.parameters())


def _lays_out_itself(layer: Mixer) -> bool:
    """Whether the input projection is a module that gives rows as ``laid_out`` has them."""
    return bool(getattr(layer.input_projection, "lays_out", False))


def gate_parameters(layer: Mixer, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return A_log and dt_bias in float32; of a gate that a wrapper watches, what a call on its inputs gives."""
    gate = layer.decay_gate
    if plain(gate, DecayGate) and isinstance(gate, DecayGate):
        return gate.A_log.float(), gate.dt_bias.float()
    _, A_log, dt_bias = gate(inputs.detach(), True)
    return A_log, dt_bias


def _is_read(owner: Any, x: Tensor) -> bool:
    """Whether all that is read, rather than used by a module that is called, is as the layer made it, beside x."""
    kinds = dict(getattr(owner, "plain_children", {}))
    gate = kinds.pop("decay_gate", None)
    if gate is None or not _calls_as_it_is(owner.decay_gate, gate):
        return False
    read = [(getattr(owner, name), kind) for name, kind in kinds.items()]
    if plain(owner.decay_gate, DecayGate):
        read.append((owner.decay_gate, DecayGate))
    parameters = list(owner.parameters(recurse=False))
    for module, kind in read:
        if module is not None:
            if not plain(module, kind):
                return False
            parameters += list(module.parameters())  # a list: torch.compile of torch 2.11 adds no generators
    return all(_is_there(p, x, owner.parameter_kinds) for p in parameters)


def _calls_as_it_is(gate: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the gate's module, which is called, gives what it is asked for: FSDP only brings its parameters."""
    return plain(gate, kind) or (isinstance(gate, kind) and hasattr(gate, "unshard"))


def _is_there(p: Tensor, x: Tensor, kinds: tuple[type, ...] = TENSORS) -> bool:
    """Whether a parameter is a plain tensor beside x, not a share of one, a packed one, or one that is elsewhere."""
    return type(p) in kinds and p.device == x.device and p.numel() > 0


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of what a projection makes of x."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64


def check_projected(caller: str, layer: Mixer, x: Tensor) -> None:
    """Raise TypeError where projections of another dtype than x's would refuse what is written by then."""
    module = layer.output_projection
    if type(module) is nn.Linear and module.weight.dtype != x.dtype and not _autocasts(x):
        raise TypeError(f"{caller}: x must be {module.weight.dtype}, as the layer's projections are, got {x.dtype}")


def _key(layer: Mixer, dtype: torch.dtype, computes_gate: bool) -> bool:
    heads = tuple(layer.heads)  # torch.compile of torch 2.11 finds no key that holds a NamedTuple
    return (layer.state_expansion, layer.head_dim, heads, dtype, computes_gate) in built.VARIANTS


def plain(module: nn.Module, kind: type[Child]) -> TypeGuard[Child]:
    """Whether a module is of this class itself, with nothing that wants to see its calls."""
    watched = "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)
    return type(module) is kind and not watched


def project(layer: Mixer, x: Tensor) -> Projected:
    """Return the input projection of x, for many tokens with its rows aligned and the gate's inputs at their ends.

    Products of matrices whose rows are no multiples of 16 bytes take several times as long. A projection that must be
    called is, and may have any number of columns more.
    """
    mixed, forget, gates = split_sizes(layer)
    if _lays_out_itself(layer):
        return Projected(layer.input_projection(x), mixed + gates, mixed)
    if not _lays_out(layer, x):
        return Projected(layer.input_projection(x), mixed, mixed + forget)
    module = cast(nn.Linear, layer.input_projection)
    weight, bias = module.weight, module.bias
    dtype = compute_dtype(x)
    rows = _laid_out(weight.to(dtype), (mixed, forget, gates))
    return Projected(
        F.linear(x, rows, None if bias is None else _laid_out(bias.to(dtype), (mixed, forget, gates))),
        mixed + gates, mixed,
    )  # fmt: skip


def _lays_out(layer: Mixer, x: Tensor) -> bool:
    """Whether the weight of the input projection is laid out anew for a call."""
    many = torch.compiler.is_compiling() or not known(x[..., 0].numel() < LEAST_TOKENS)
    return many and reads_projection(layer, x)


def _laid_out(weight: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    mixed, forget, gates = torch.split(weight, list(sizes))
    return laid_out((mixed, gates, forget))


def laid_out(parts: Sequence[Tensor]) -> Tensor:
    """Return rows of the convolution, of the output gates, of the gate's inputs, and zeros up to a multiple."""
    return torch.cat(filled(parts, 0))


def filled(parts: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Return parts of rows along ``dim``, and zeros after them up to a multiple of ``ROW``."""
    first = parts[0]
    sizes = list(first.shape)
    sizes[dim] = -sum(part.shape[dim] for part in parts) % ROW
    return [*parts, first.new_zeros(()).expand(sizes)]


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
    out, last, after = between(layer, project(layer, x), States(conv, state), cu_seqlens, cu_seqlens_cpu)
    return layer.output_projection(out), last, after


def between(
    layer: Mixer,
    projected: Projected,
    given: States,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output projection's input of the rows of the input projection, and the states after them."""
    rows, gate, output_gate = projected
    conv, state = given.conv, given.state
    A_log, dt_bias = gate_parameters(layer, rows[..., gate : gate + layer.heads.f])
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
    return out, last_inputs(rows, before, cu_seqlens, channels, back), after
