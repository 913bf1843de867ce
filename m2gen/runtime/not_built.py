"""The error for calls that no kernels serve: what was asked, what is built, and how to build it."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

import torch

from . import built
from .facts import HeadCounts, VariantKey

MOST_NAMED = 20
"""Variants or layers that an error names before it counts the rest."""


class VariantNotBuiltError(ValueError):
    """A call whose dims, heads, dtype or gate this package holds no kernels for."""


def not_built(caller: str, variant: VariantKey) -> str:
    """Say what was asked for, what is built, and what to add to the spec."""
    k, v, heads, dtype, computes_gate = variant
    groups = ", ".join(f"{name}: {count}" for name, count in zip(HeadCounts._fields, heads, strict=True))
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype))
    gate = "softplus" if computes_gate else "given"
    facts = f"head_dim: {v}, state_expansion: {k}, heads: {{{groups}}}, dtypes: [{short}], gate: {gate}"
    there = first(built.VARIANTS.values(), "; ")
    return (
        f"{caller}: no kernels for K={k}, V={v}, heads {groups}, {dtype}, gate {gate}; built: {there}. "
        f"To build them, add to the layers of {built.SPEC_FILE} `my_layer: {{{facts}}}` and run `{built.COMMAND}`"
    )


def first(names: Collection[str], separator: str = ", ") -> str:
    """Join the first names, and say how many more there are."""
    shown = separator.join(islice(names, MOST_NAMED))
    return shown if len(names) <= MOST_NAMED else f"{shown}{separator}and {len(names) - MOST_NAMED} more"


def check_built(rows: int, cols: int, heads: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Raise VariantNotBuiltError unless some built variant has these dims, in whatever dtype."""
    if not any(key[:3] == (rows, cols, heads) for key in built.VARIANTS):
        raise VariantNotBuiltError(not_built("M2RNN", (rows, cols, heads, dtype or torch.get_default_dtype(), False)))
