"""Every compile-time fact that changes what a kernel means."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from m2gen.spec import (
    MAX_HEAD_DIM,
    MAX_STATE_EXPANSION,
    ClipMode,
    Dtype,
    Fp32Products,
    GateKind,
    Heads,
    Spec,
    StateDtype,
    TanhMode,
)

MIN_TILE = 16
"""Smallest extent of a ``tl.dot`` operand."""


def padded(extent: int) -> int:
    """Return the power of two, at least ``MIN_TILE``, that a tile needs to hold ``extent`` elements."""
    return max(MIN_TILE, 1 << (extent - 1).bit_length())


@dataclass(frozen=True)
class Variant:
    """One specialisation of the recurrence: dims, head groups, dtypes and numerics."""

    state_expansion: int
    """K: rows of the state."""
    head_dim: int
    """V: columns of the state."""
    heads: Heads
    dtype: Dtype
    """Element type of q, k, v, y and the operands of products with the weight."""
    state_dtype: StateDtype
    clip: ClipMode
    tanh: TanhMode
    gate: GateKind = GateKind.GIVEN
    products: Fp32Products = Fp32Products.IEEE
    """How fp32 operands are multiplied; ``IEEE`` for the narrow dtypes, which have no choice."""

    @property
    def computes_gate(self) -> bool:
        """Whether the kernel computes the forget gate from its input, A_log and dt_bias."""
        return self.gate is GateKind.SOFTPLUS

    @property
    def total_heads(self) -> int:
        """N, the heads of the state and of y."""
        return self.heads.total

    @property
    def padded_rows(self) -> int:
        return padded(self.state_expansion)

    @property
    def padded_cols(self) -> int:
        return padded(self.head_dim)

    @property
    def masks_rows(self) -> bool:
        return self.padded_rows != self.state_expansion

    @property
    def masks_cols(self) -> bool:
        return self.padded_cols != self.head_dim

    @property
    def key(self) -> str:
        """The variant's name in files, tables and records: dims, groups and dtype, then any other numerics."""
        heads = self.heads
        groups = f"q{heads.q}_k{heads.k}_v{heads.v}_f{heads.f}_w{heads.w}"
        numerics = [self.dtype, self.clip, self.tanh]
        numerics += [self.products] if self.products is Fp32Products.TF32 else []
        numerics += [self.gate] if self.computes_gate else []
        return f"k{self.state_expansion}_v{self.head_dim}_{groups}_{'_'.join(numerics)}"


@dataclass(frozen=True)
class BuiltVariant:
    """A variant and the layers of the spec that asked for it."""

    variant: Variant
    layers: tuple[str, ...]


def expand(spec: Spec) -> tuple[BuiltVariant, ...]:
    """Return each variant of ``spec`` once, in the order of the file, with the layers that need it."""
    layers: dict[Variant, list[str]] = {}
    for name, layer in spec.layers.items():
        for point in layer.points():
            variant = Variant(
                state_expansion=point.state_expansion,
                head_dim=point.head_dim,
                heads=point.heads,
                dtype=point.dtype,
                state_dtype=spec.numerics.state,
                clip=spec.numerics.clip,
                tanh=spec.numerics.tanh,
                gate=point.gate,
                products=spec.numerics.fp32_products if point.dtype is Dtype.FP32 else Fp32Products.IEEE,
            )
            names = layers.setdefault(variant, [])
            if name not in names:
                names.append(name)
    return tuple(BuiltVariant(variant, tuple(names)) for variant, names in layers.items())


def layer_names(built: Iterable[BuiltVariant]) -> dict[Variant, str]:
    """Return the names of variants in tables and messages: layers and dtype, as ``m2rnn_7b bf16``.

    Variants of a grid, which share layers and dtype, are told apart by the facts in which they differ. A variant that
    no layer asks for is named by its dims, as ``K64 V16 N132 bf16``.
    """
    named: dict[str, list[Variant]] = {}
    for each in built:
        named.setdefault(_plain_name(each), []).append(each.variant)
    return {variant: name for plain, same in named.items() for variant, name in _told_apart(plain, same).items()}


def _plain_name(built: BuiltVariant) -> str:
    v = built.variant
    return f"{'/'.join(built.layers) or f'K{v.state_expansion} V{v.head_dim} N{v.total_heads}'} {v.dtype}"


def _told_apart(name: str, variants: list[Variant]) -> dict[Variant, str]:
    """Append to the name of each variant the facts in which variants of that name differ."""
    facts = [_facts(variant) for variant in variants]
    differing = [place for place, values in enumerate(zip(*facts, strict=True)) if len(set(values)) > 1]
    return {v: " ".join([name, *(fact[i] for i in differing)]) for v, fact in zip(variants, facts, strict=True)}


def _facts(variant: Variant) -> tuple[str, ...]:
    heads = " ".join(f"{role}{count}" for role, count in zip("qkvfw", variant.heads.counts, strict=True))
    numerics = (f"tanh {variant.tanh}", f"clip {variant.clip}", f"gate {variant.gate}", str(variant.products))
    return (f"K{variant.state_expansion}", f"V{variant.head_dim}", heads, *numerics)


_KEY = re.compile(
    r"k(?P<rows>\d+)_v(?P<cols>\d+)_q(?P<q>\d+)_k(?P<k>\d+)_v(?P<v>\d+)_f(?P<f>\d+)_w(?P<w>\d+)"
    r"_(?P<dtype>[a-z0-9]+)_(?P<clip>[a-z]+)_(?P<tanh>[a-z]+)(?P<tf32>_tf32)?(?P<softplus>_softplus)?",
    re.ASCII,
)


def parse_variant(key: str) -> Variant:
    """Return the variant whose key this is; raises ValueError as ``must ..., got ...``."""
    wrong = ValueError(f"must be the key of a variant, got {key!r}")
    found = _KEY.fullmatch(key)
    if found is None:
        raise wrong
    try:
        variant = Variant(
            state_expansion=int(found["rows"]),
            head_dim=int(found["cols"]),
            heads=Heads(**{role: int(found[role]) for role in "qkvfw"}),
            dtype=Dtype(found["dtype"]),
            state_dtype=StateDtype.FP32,
            clip=ClipMode(found["clip"]),
            tanh=TanhMode(found["tanh"]),
            gate=GateKind.SOFTPLUS if found["softplus"] else GateKind.GIVEN,
            products=Fp32Products.TF32 if found["tf32"] else Fp32Products.IEEE,
        )
    except ValueError as error:
        raise wrong from error
    served = 1 <= variant.state_expansion <= MAX_STATE_EXPANSION and 1 <= variant.head_dim <= MAX_HEAD_DIM
    if not served or variant.key != key:
        raise wrong
    return variant
