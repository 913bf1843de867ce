"""Every output and gradient of a generated package against the float64 reference, within derived budgets.

A tensor's budget is FACTOR times the error that the eager reference makes when it rounds where the kernel's own
dtypes round, on the same inputs, plus one rounding of the tensor's dtype (docs/design.md, section 6). Rounding depends
on the order of sums, and a small tensor's error on luck: the largest error of ORDERS orders of the state's rows counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from m2gen import reference
from m2gen.problem import TORCH_DTYPE, Gates, Inputs, Problem, make_inputs
from m2gen.reference import EXACT, Arithmetic
from m2gen.spec import ClipMode, TanhMode
from m2gen.variant import MIN_TILE, Variant

FACTOR = 2.0
ORDERS = 4
OPERANDS = ("q", "k", "v", "weight", "forget", "initial_state")
TENSORS = ("y", "state", "dq", "dk", "dv", "dweight", "dforget", "dinitial_state")

Operator = Callable[..., tuple[Tensor, Tensor]]


class Loss(StrEnum):
    """Which results the gradients come from."""

    Y = "y"
    STATE = "state"
    BOTH = "both"


@dataclass(frozen=True)
class Case:
    """One check: a problem, how its inputs are drawn, and what is differentiated."""

    name: str
    problem: Problem
    loss: Loss = Loss.BOTH
    gates: Gates = Gates.MIXED
    dy_scale: float = 1.0
    clip: float | None = 1.0


@dataclass(frozen=True)
class TensorResult:
    """One tensor's relative error ‖out - ref‖ / ‖ref‖ against its budget; absolute where ref is 0."""

    tensor: str
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # False for NaN


@dataclass(frozen=True)
class CaseReport:
    """What one case found."""

    variant: str
    case: str
    seed: int
    results: tuple[TensorResult, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)


def cases(variant: Variant, interval: int, *, interpreted: bool, quick: bool = False) -> tuple[Case, ...]:
    """Return the cases of a variant; the interpreter gets fewer and shorter ones the more tiles it has to walk."""
    tiles = variant.total_heads * variant.padded_rows // MIN_TILE
    ragged = Problem(1 if interpreted else 2, interval + 3, initial_state=True)
    if interpreted and (quick or tiles > 64):
        return (Case("ragged", ragged if tiles <= 64 else Problem(1, 3, initial_state=True)),)
    full = (
        Case("ragged", ragged),
        Case("y_only", Problem(1, interval), Loss.Y),
        Case("state_only", Problem(1, interval + 1, initial_state=True), Loss.STATE),
        Case("one_step", Problem(2, 1)),
        Case("packed", Problem(0, 0, lengths=(2, 0, interval + 1, 1), initial_state=True)),
        Case("small_dy", ragged, dy_scale=0.01),
        Case("large_dy", ragged, dy_scale=100.0),
        Case("no_clip", ragged, clip=None),
        Case("slow_gates", ragged, gates=Gates.SLOW),
    )
    return full if interpreted else (*full, Case("long", Problem(2, 32 * interval + 1, initial_state=True)))


def run_case(operator: Operator, variant: Variant, case: Case, seed: int, device: torch.device) -> CaseReport:
    """Run ``operator`` (the package's ``m2rnn``) on one case and judge every result and gradient."""
    start = time.monotonic()
    inputs = make_inputs(variant, case.problem, seed, gates=case.gates, dy_scale=case.dy_scale).to(device)
    with _poisoned():
        given = _differentiate(operator, inputs, case, None)

    def eager(arithmetic: Arithmetic) -> Operator:
        def call(*operands: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
            return reference.m2rnn(
                *operands, clip=clip, clamp_total=variant.clip is ClipMode.TOTAL, arithmetic=arithmetic
            )

        return call

    own = Arithmetic(torch.float32, TORCH_DTYPE[variant.dtype], rounded_tanh=variant.tanh is TanhMode.APPROX)
    exact = _differentiate(eager(EXACT), inputs, case, torch.float64)
    errors = [_order_errors(eager(own), inputs, case, exact, seed + i) for i in range(ORDERS)]
    results = tuple(
        TensorResult(
            name,
            relative_error(given[name], exact[name]),
            FACTOR * max(error[name] for error in errors) + torch.finfo(given[name].dtype).eps / 2,
        )
        for name in TENSORS
        if name in exact
    )
    return CaseReport(variant.key, case.name, seed, results, time.monotonic() - start)


def _order_errors(
    operator: Operator, inputs: Inputs, case: Case, exact: dict[str, Tensor], seed: int
) -> dict[str, float]:
    """Return the error of every tensor with the rows of the state, which never mix, in an order drawn from ``seed``."""
    order = torch.randperm(inputs.q.shape[-1], generator=torch.Generator().manual_seed(seed)).to(inputs.q.device)
    initial_state = None if inputs.initial_state is None else inputs.initial_state[..., order, :]
    reordered = replace(
        inputs,
        q=inputs.q[..., order],
        k=inputs.k[..., order],
        initial_state=initial_state,
        dstate=inputs.dstate[..., order, :],
    )
    rows = {"dq": -1, "dk": -1, "state": -2, "dinitial_state": -2}
    return {
        name: relative_error(out, exact[name].index_select(rows[name], order) if name in rows else exact[name])
        for name, out in _differentiate(operator, reordered, case, None).items()
    }


def relative_error(out: Tensor, ref: Tensor) -> float:
    """Return ‖out - ref‖ / ‖ref‖ in float64, ‖out‖ where ref is 0 everywhere."""
    if out.shape != ref.shape:
        return math.inf
    norm = ref.double().norm().item()
    return float((out.double() - ref.double()).norm().item() / (norm or 1.0))


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fill what torch allocates without initialising with NaN, so that an element nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills, by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _differentiate(operator: Operator, inputs: Inputs, case: Case, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the results and gradients of one call by name, with operands cast to ``dtype`` if given."""
    leaves: dict[str, Tensor] = {}
    for name in OPERANDS:
        x = getattr(inputs, name)
        if x is not None:
            leaves[name] = (x if dtype is None else x.to(dtype)).clone().requires_grad_()
    operands = [leaves.get(name) for name in OPERANDS]
    y, state = operator(*operands, inputs.cu_seqlens, clip=case.clip)
    outputs: list[tuple[Tensor, Any]] = []
    if case.loss is not Loss.STATE:
        outputs.append((y, inputs.dy.to(y.dtype)))
    if case.loss is not Loss.Y:
        outputs.append((state, inputs.dstate.to(state.dtype)))
    gradients = torch.autograd.grad(
        [out for out, _ in outputs], list(leaves.values()), [grad for _, grad in outputs], materialize_grads=True
    )
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}
