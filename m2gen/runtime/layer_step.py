"""Launch the kernel that takes a layer from a token's projection to the input of its output projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .layer_launches import LayerKernels


class StepParameters(NamedTuple):
    """Tensors that the operator takes, in their order; None where a layer has none."""

    x: Tensor
    """A token of each sequence, (B, hidden)."""
    weight: Tensor
    """The input projection's, (P, hidden)."""
    bias: Tensor | None
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    state_weight: Tensor
    A_log: Tensor
    dt_bias: Tensor
    skip: Tensor | None
    """D of the layer, (N, V)."""
    norm_weight: Tensor | None
    conv: Tensor
    """Inputs of the convolution, (slots, width - 1, channels), written in place."""
    state: Tensor
    """States of the recurrence, (slots, N, K, V), written in place."""
    indices: Tensor | None
    """Slots of the sequences, (B,), negative for those that are left out; 0, 1, ... if None."""
    out_indices: Tensor | None
    """Slots that are written, (B,); those that are read if None."""


class StepSettings(NamedTuple):
    """Numbers that the operator takes, in their order."""

    dims: Sequence[int]
    """K and V, then the heads of q, k, v, f and w."""
    silu: bool
    rounds: bool
    """Whether the gate is rounded to the projection's dtype."""
    norm: bool
    eps: float


def advance(
    kernels: LayerKernels, rows: Tensor, operands: Sequence[Tensor | None], settings: StepSettings, approximate: bool
) -> Tensor:
    """Advance the states by the rows (B, P) of a projection, in place; return the output projection's input, (B, N V).

    ``operands`` are those of ``StepParameters`` from the convolution's weight on. ``approximate`` asks for a GPU's own
    tanh.
    """
    conv_weight, conv, state = operands[0], operands[7], operands[8]
    assert conv is not None
    assert state is not None
    plan, batch = kernels.plan, rows.shape[0]
    (parts, warps, size), width = plan.decode, 0 if conv_weight is None else conv_weight.shape[-1]
    forget = plan.channels
    scratch = rows.new_empty(batch * parts, size, dtype=torch.float32)
    r = rows.new_empty(batch, plan.inner, dtype=torch.float32)
    ended, out = rows.new_zeros(batch, dtype=torch.int32), rows.new_empty(batch, plan.inner)
    kernels.launch(
        "decode", batch * parts, warps, (rows, *operands, ended, scratch, r, out),
        (settings.eps, forget, forget + settings.dims[5], rows.stride(0), *conv.stride(), *state.stride(),
         state.shape[0]),
        WIDTH=width, SILU=settings.silu, ROUNDS=settings.rounds, NORM=settings.norm, NW=settings.dims[6],
        APPROXIMATE=approximate,
    )  # fmt: skip
    return out
