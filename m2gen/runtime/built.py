"""What was built: the facts of this package, which its other modules read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .facts import LayerKey, Point, VariantKey
from .snapshot import reload_older

NAME: str = "runtime"
"""Name of the package."""
SPACE: Any = torch.ops.m2gen_runtime
"""Where torch has the operators of this content."""
SPEC_FILE: str = "specs/tiny.yaml"
"""File name of the spec, without folders."""
COMMAND: str = "m2gen build --spec tiny.yaml"
"""What builds the package again."""
CLAMP_TOTAL: bool = False
"""Whether ``clip`` bounds the whole gradient of a state, not only what later steps carry to it."""
APPROXIMATE: bool = False
"""Whether tanh may use a GPU's approximate instruction."""
VARIANTS: Mapping[VariantKey, str] = {}
"""Names of the variants that kernels serve."""
LAYERS: Mapping[str, tuple[Point, ...]] = {}
"""Layers of the spec, with the points of their grids."""
KERNELS: Mapping[str, Mapping[str, tuple[str, ...]]] = {}
"""Modules of kernels by arch and variant: one for all calls, or one for each bucket.

A bucket is how many programs, heads of all sequences, there are for each SM. "portable" serves the interpreter and
every arch that is not listed.
"""
LAYER_KERNELS: Mapping[tuple[int, ...], str] = {}
"""Modules of the kernels around the recurrence, by K, V and the heads of q, k, v and f."""
LAYER_TUNED: Mapping[str, Mapping[LayerKey, str]] = {}
"""The same with tiles that were searched for an arch, by that, then by dims, heads and dtype."""
POOL_KERNELS: Mapping[tuple[int, ...], str] = {}
"""Modules of the kernels on pools of states, by K, V and the heads of q, k, v, f and w."""
POOL_EXPLICIT: Mapping[str, Mapping[tuple[int, ...], str]] = {}
"""Modules of the kernel of tokens on pools with operands of 16 bits, by arch and the same."""
HALVES: tuple[int, ...] = ()
"""The most programs of each bucket but the last, in halves of a program an SM."""
PORTABLE_SMS: int = 1
"""SMs that buckets of the portable kernels reckon with."""

reload_older(__package__, SPACE)
