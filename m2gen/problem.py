"""Run-time sizes, and seeded inputs that reach the corners of the recurrence."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import StrEnum

import torch
from torch import Tensor

from m2gen.spec import Dtype
from m2gen.variant import Variant

TORCH_DTYPE = {Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16, Dtype.FP32: torch.float32}


class Gates(StrEnum):
    """How the forget gate is drawn."""

    MIXED = "mixed"
    """Sigmoids of a shifted normal, a tenth of them exactly 0 and a tenth exactly 1."""
    SLOW = "slow"
    """1 - 1e-4 in float32: the state hardly forgets."""


@dataclass(frozen=True)
class Problem:
    """The sizes of one call."""

    batch: int
    seq: int
    lengths: tuple[int, ...] | None = None
    """Lengths of packed sequences, in place of batch and seq."""
    initial_state: bool = False

    @property
    def sequences(self) -> int:
        return self.batch if self.lengths is None else len(self.lengths)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading dims of every per-step tensor."""
        return (self.batch, self.seq) if self.lengths is None else (sum(self.lengths),)


@dataclass(frozen=True)
class Inputs:
    """The operands of one call and the gradients that come back to it."""

    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor
    forget: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    dy: Tensor
    dstate: Tensor
    A_log: Tensor | None = None
    """With ``dt_bias`` (Nf,), only where the kernel computes the gate; ``forget`` is its input then."""
    dt_bias: Tensor | None = None

    def to(self, device: torch.device) -> Inputs:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: x.to(device) for name, x in moved.items() if x is not None})


def make_inputs(
    variant: Variant, problem: Problem, seed: int, *, gates: Gates = Gates.MIXED, dy_scale: float = 1.0
) -> Inputs:
    """Draw inputs on the CPU, so that a seed means the same numbers on every machine.

    q (*lead, Nq, K), k, v, forget (*lead, Nf) and weight in the variant's dtype; SLOW gates and states in float32.
    The weight is near the identity, as in training; k and v are large enough to saturate some of the tanh.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype, heads, lead = TORCH_DTYPE[variant.dtype], variant.heads, problem.lead
    rows, cols, total = variant.state_expansion, variant.head_dim, variant.total_heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    state = (problem.sequences, total, rows, cols)
    offsets = None
    if problem.lengths is not None:
        offsets = torch.tensor((0, *problem.lengths), dtype=torch.int32).cumsum(0).to(torch.int32)
    return Inputs(
        q=normal(*lead, heads.q, rows).to(dtype),
        k=normal(*lead, heads.k, rows).to(dtype),
        v=normal(*lead, heads.v, cols).to(dtype),
        weight=(torch.eye(cols) + normal(heads.w, cols, cols) * (0.3 / cols**0.5)).to(dtype),
        forget=_gates(variant, gates, generator, lead),
        initial_state=normal(*state) if problem.initial_state else None,
        cu_seqlens=offsets,
        dy=(normal(*lead, total, cols) * dy_scale).to(dtype),
        dstate=normal(*state) * dy_scale,
        **_gate_parameters(variant, generator),
    )


def _gate_parameters(variant: Variant, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw A_log and dt_bias as published layers do: A uniform below 16, softplus(dt_bias) log-uniform below 0.1."""
    if not variant.computes_gate:
        return {}
    scale, step = torch.rand(2, variant.heads.f, generator=generator)
    dt = 1e-3 * 100**step
    return {"A_log": (16 * scale).clamp_min(0.01).log(), "dt_bias": dt + torch.log(-torch.expm1(-dt))}


def _gates(variant: Variant, gates: Gates, generator: torch.Generator, lead: tuple[int, ...]) -> Tensor:
    """Return f, or where the kernel computes it a standard normal input, shifted towards f = 1 for ``SLOW``."""
    shape, dtype = (*lead, variant.heads.f), TORCH_DTYPE[variant.dtype]
    if variant.computes_gate:
        x = torch.randn(*shape, generator=generator)
        return x - 9 if gates is Gates.SLOW else x.to(dtype)
    if gates is Gates.SLOW:
        return torch.full(shape, 1 - 1e-4)
    gate = torch.sigmoid(torch.randn(*shape, generator=generator) + 1)
    corner = torch.rand(*shape, generator=generator)
    gate[corner < 0.1] = 0.0
    gate[corner > 0.9] = 1.0
    return gate.to(dtype)
