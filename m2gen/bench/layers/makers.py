"""The layers that need no other package: m2gen's, one around a peer's operator, and torch's attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2gen.bench import peers
from m2gen.bench.layers.entries import LayerEntry
from m2gen.bench.layers.kinds import LayerKind
from m2gen.bench.layers.subject import Decoder, LayerShape, LayerSubject, same_in
from m2gen.bench.operators import CannotServe, package_at
from m2gen.problem import TORCH_DTYPE
from m2gen.runtime.convolution import convolve
from m2gen.runtime.mixer import split_sizes
from m2gen.runtime.scan import bypass, epilogue, operands_of
from m2gen.spec import GateKind
from m2gen.variant import Variant

HEAD_DIM = 128
"""Columns of an attention head."""
ROOM = 16
"""Tokens beyond those before for which attention's cache has room."""


def subject_of(entry: LayerEntry, device: torch.device) -> LayerSubject:
    """Return the layer of an entry; raises CannotServe, or whatever a package or an adapter raises."""
    workload, layer = entry.workload, entry.layer
    dtype = TORCH_DTYPE[workload.variant.dtype]
    shape = LayerShape(workload.hidden, workload.variant, dtype, device, layer.timing_only)
    torch.manual_seed(0)
    if layer.kind is LayerKind.ATTENTION:
        return attention(shape)
    if layer.kind is LayerKind.PEER:
        found: LayerSubject | None = peers.found_by(layer.source, shape)
        if found is None:
            raise CannotServe(f"{layer.source} does not serve this layer")
        return found
    ours = m2rnn_of(shape, package_at(layer.package))
    if layer.kind is LayerKind.OPERATOR:
        return around(ours, layer.source, workload.variant)
    return _called(ours, compiled=layer.kind is LayerKind.COMPILED)


def m2rnn_of(shape: LayerShape, package: Any) -> nn.Module:
    """Return the package's layer of a variant, its parameters drawn as by default."""
    variant = shape.variant
    heads = {"q": variant.heads.q, "k": variant.heads.k, "v": variant.heads.v, "f": variant.heads.f,
             "w": variant.heads.w}  # fmt: skip
    made: nn.Module = package.M2RNN(
        shape.hidden, variant.state_expansion, variant.head_dim, heads, device=shape.device, dtype=shape.dtype
    )
    return made


def _called(layer: Any, *, compiled: bool) -> LayerSubject:
    call = layer
    if compiled:
        torch.compiler.reset()  # all layers share one code object, which dynamo recompiles only so often
        call = torch.compile(layer, dynamic=False, fullgraph=True)

    def decoder(batch: int, before: int) -> Decoder:
        cache = layer.allocate_cache(batch)
        return Decoder(lambda x: call(x, cache), lambda: 2 * sum(_bytes(x) for x in (cache.conv, cache.state)))

    return LayerSubject(layer, call, same_in(_reference(layer)), decoder)


def _reference(layer: Any) -> Any:
    other = copy.deepcopy(layer)
    other.backend = "reference"
    return other


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def around(layer: Any, adapter: str, variant: Variant) -> LayerSubject:
    """Return the layer with the operator of an adapter, which is given the gate; raises CannotServe if it has none."""
    operator = peers.operator_of(adapter, replace(variant, gate=GateKind.GIVEN))
    if operator is None:
        raise CannotServe(f"{adapter} does not serve this variant")
    scan = _scan_around(layer, operator)

    def decoder(batch: int, before: int) -> Decoder:
        cache = layer.allocate_cache(batch)

        def step(x: Tensor) -> Tensor:
            y, conv, state = scan(x, cache.conv, cache.state)
            cache.conv.copy_(conv)
            cache.state.copy_(state)
            return y

        return Decoder(step, lambda: 2 * sum(_bytes(x) for x in (cache.conv, cache.state)))

    return LayerSubject(layer, lambda x: scan(x)[0], same_in(_reference(layer)), decoder)


def _scan_around(layer: Any, operator: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def scan(x: Tensor, conv: Tensor | None = None, state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        mixed, f, g = layer.input_projection(x).split(split_sizes(layer), -1)
        mixed, conv = convolve(layer.conv1d, mixed, layer.conv_width, conv)
        q, k, v = operands_of(layer, mixed)
        y, state = operator(q, k, v, layer.state_weight, layer.decay_gate(f), state, None, clip=layer.clip)
        return epilogue(layer, bypass(layer, y, v), g), conv, state

    return scan


class Attention(nn.Module):
    """Causal attention as wide as the model, heads of 128 columns, without positions."""

    def __init__(self, hidden: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        made: Any = {"device": device, "dtype": dtype}
        self.columns = min(HEAD_DIM, hidden)
        if hidden % self.columns:
            raise CannotServe(f"attention has heads of {HEAD_DIM} columns, which must divide {hidden}")
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False, **made)
        self.out = nn.Linear(hidden, hidden, bias=False, **made)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v (B, heads, S, columns) of x (B, S, hidden)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.columns)).permute(2, 0, 3, 1, 4).unbind()
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of x (B, S, hidden)."""
        q, k, v = self.operands(x)
        return self.finish(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def finish(self, y: Tensor) -> Tensor:
        """Return the result of what the heads give."""
        mixed: Tensor = self.out(y.transpose(1, 2).flatten(-2))
        return mixed


def attention(shape: LayerShape) -> LayerSubject:
    """Return torch's attention; a token attends to all that were before it."""
    layer = Attention(shape.hidden, shape.device, shape.dtype)

    def decoder(batch: int, before: int) -> Decoder:
        heads = shape.hidden // layer.columns
        keys, values = torch.zeros(
            2, batch, heads, before + ROOM, layer.columns, device=shape.device, dtype=shape.dtype
        ).unbind()
        filled = before

        def step(x: Tensor) -> Tensor:
            nonlocal filled
            q, k, v = layer.operands(x)
            at = min(filled, before + ROOM - 1)
            keys[:, :, at : at + 1], values[:, :, at : at + 1] = k, v
            filled = at + 1
            return layer.finish(F.scaled_dot_product_attention(q, keys[:, :, :filled], values[:, :, :filled]))

        def traffic() -> int:
            a_token = _bytes(keys) // keys.shape[2]
            return 2 * (filled - 1) * a_token + 2 * a_token

        return Decoder(step, traffic)

    return LayerSubject(layer, layer, same_in(layer), decoder)
