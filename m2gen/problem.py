"""Run-time sizes, and seeded inputs that cover the corner cases of the recurrence."""

from __future__ import annotations

import math
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
    """Sigmoids of a shifted normal, a tenth of them exactly 0 and a tenth exactly 1; if the kernel computes the gate,
    a standard normal input."""
    SLOW = "slow"
    """1 - 1e-4 in float32: the state hardly forgets."""
    VANISHING = "vanishing"
    """1 - f is about 1e-6, of which 1 - float32(f) keeps 4 bits; only if the kernel computes the gate."""
    ZERO = "zero"
    ONE = "one"


class Weights(StrEnum):
    """How the state weight is drawn."""

    TRAINED = "trained"
    """The identity and a normal of 0.3 / sqrt(V), as in training."""
    IDENTITY = "identity"
    ORTHOGONAL = "orthogonal"
    NORMAL = "normal"
    """Standard normal: the recurrence is chaotic, so for a few steps only."""


@dataclass(frozen=True)
class Draw:
    """How the inputs of a problem are drawn."""

    gates: Gates = Gates.MIXED
    weights: Weights = Weights.TRAINED
    dy_scale: float = 1.0
    """Scale of the incoming gradients."""
    value_scale: float = 1.0
    """Scale of k and v; from about 8 on, nearly every tanh is saturated."""
    wide: bool = False
    """forget and weight are float32, with values that the narrow dtypes cannot represent."""
    repeated: bool = False
    """Every step of every sequence has the operands and dy of the first."""


PLAIN = Draw()


@dataclass(frozen=True)
class Problem:
    """The sizes of one call."""

    batch: int
    seq: int
    lengths: tuple[int, ...] | None = None
    """Lengths of packed sequences, instead of batch and seq."""
    initial_state: bool = False
    long_offsets: bool = False
    """Whether ``cu_seqlens`` is int64 rather than int32."""

    @property
    def sequences(self) -> int:
        return self.batch if self.lengths is None else len(self.lengths)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading dims of every per-step tensor."""
        return (self.batch, self.seq) if self.lengths is None else (sum(self.lengths),)


def packed_problem(sequences: int, longest: int) -> Problem:
    """Return a packed call of sequences of 1 to ``longest`` tokens, the same lengths on every machine."""
    generator = torch.Generator().manual_seed(sequences)
    lengths = torch.randint(1, longest + 1, (sequences,), generator=generator).tolist()
    return Problem(0, 0, lengths=tuple(lengths))


STEPWISE = ("q", "k", "v", "forget", "dy")
"""Operands and gradients of a call that have a row for each step."""


@dataclass(frozen=True)
class Inputs:
    """The operands of one call, and the gradients of its results."""

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
    """A_log and dt_bias, both (Nf,), are there only if the kernel computes the gate; ``forget`` is then its input."""
    dt_bias: Tensor | None = None

    def to(self, device: torch.device) -> Inputs:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: x.to(device) for name, x in moved.items() if x is not None})


def make_inputs(variant: Variant, problem: Problem, seed: int, draw: Draw = PLAIN) -> Inputs:
    """Draw inputs on the CPU, so that a seed means the same numbers on every machine.

    q (*lead, Nq, K), k, v, forget (*lead, Nf) and weight in the variant's dtype; SLOW gates and states in float32.
    With ``PLAIN``, the weight is near the identity, as in training, and k and v saturate some of the tanh.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype, heads, lead = TORCH_DTYPE[variant.dtype], variant.heads, problem.lead
    rows, cols, total = variant.state_expansion, variant.head_dim, variant.total_heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def per_step(*shape: int, scale: float = 1.0) -> Tensor:
        x = normal(*lead, *shape) * scale
        return (_repeated(x, lead) if draw.repeated else x).to(dtype)

    parameters = _gate_parameters(variant, generator)
    state = (problem.sequences, total, rows, cols)
    inputs = Inputs(
        q=per_step(heads.q, rows),
        k=per_step(heads.k, rows, scale=draw.value_scale),
        v=per_step(heads.v, cols, scale=draw.value_scale),
        weight=_weight(variant, draw.weights, generator).to(dtype),
        forget=_gates(variant, draw, generator, lead, parameters),
        initial_state=normal(*state) if problem.initial_state else None,
        cu_seqlens=_offsets(problem),
        dy=per_step(total, cols, scale=draw.dy_scale),
        dstate=normal(*state) * draw.dy_scale,
        **parameters,
    )
    return _widened(inputs) if draw.wide else inputs


def _repeated(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Return x with every entry of its leading dims equal to the first."""
    return x[(slice(0, 1),) * len(lead)].expand(x.shape)


def _offsets(problem: Problem) -> Tensor | None:
    if problem.lengths is None:
        return None
    offsets = torch.tensor((0, *problem.lengths), dtype=torch.int64).cumsum(0)
    return offsets if problem.long_offsets else offsets.to(torch.int32)


def _widened(inputs: Inputs) -> Inputs:
    """Return forget and weight in float32, moved to values that the narrow dtypes cannot represent."""
    off = 1 - 2.0**-11
    return replace(inputs, forget=inputs.forget.float() * off, weight=inputs.weight.float() * off)


def _weight(variant: Variant, weights: Weights, generator: torch.Generator) -> Tensor:
    """Draw the state weight (Nw, V, V) in float32."""
    cols = variant.head_dim
    noise = torch.randn(variant.heads.w, cols, cols, generator=generator)
    if weights is Weights.NORMAL:
        return noise
    if weights is Weights.ORTHOGONAL:
        orthogonal: Tensor = torch.linalg.qr(noise.double()).Q
        return orthogonal.float()
    identity = torch.eye(cols).expand_as(noise)
    return identity if weights is Weights.IDENTITY else identity + noise * (0.3 / cols**0.5)


def _gate_parameters(variant: Variant, generator: torch.Generator) -> dict[str, Tensor]:
    return gate_parameters(variant.heads.f, generator) if variant.computes_gate else {}


def gate_parameters(heads: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw A_log and dt_bias as published layers do: A uniform below 16, softplus(dt_bias) log-uniform below 0.1."""
    scale, step = torch.rand(2, heads, generator=generator)
    dt = 1e-3 * 100**step
    return {"A_log": (16 * scale).clamp_min(0.01).log(), "dt_bias": dt + torch.log(-torch.expm1(-dt))}


def _gates(
    variant: Variant, draw: Draw, generator: torch.Generator, lead: tuple[int, ...], parameters: dict[str, Tensor]
) -> Tensor:
    """Return f, or the gate's input if the kernel computes it, in the variant's dtype; SLOW gates in float32."""
    shape, dtype = (*lead, variant.heads.f), TORCH_DTYPE[variant.dtype]
    if variant.computes_gate:
        noise = torch.randn(*shape, generator=generator)
        return _gate_inputs(draw.gates, _repeated(noise, lead) if draw.repeated else noise, parameters, dtype)
    if draw.gates is Gates.SLOW:
        return torch.full(shape, 1 - 1e-4)
    if draw.gates in (Gates.ZERO, Gates.ONE):
        return torch.full(shape, float(draw.gates is Gates.ONE), dtype=dtype)
    gate = torch.sigmoid(torch.randn(*shape, generator=generator) + 1)
    corner = torch.rand(*shape, generator=generator)
    gate[corner < 0.1] = 0.0
    gate[corner > 0.9] = 1.0
    return (_repeated(gate, lead) if draw.repeated else gate).to(dtype)


def _gate_inputs(gates: Gates, noise: Tensor, parameters: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return x for which exp(A_log) softplus(x + dt_bias), which is -log f, has the size that ``gates`` asks for."""
    decay = {Gates.SLOW: 1e-4, Gates.VANISHING: 1e-6}.get(gates)
    if decay is None:
        return noise.to(dtype)
    x: Tensor = noise * 0.1 + math.log(decay) - parameters["A_log"] - parameters["dt_bias"]
    return x
