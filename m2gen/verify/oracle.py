"""The float64 results of a problem, and error budgets derived from the kernel's own dtypes.

A tensor's budget is FACTOR times the error that the eager reference makes when it rounds where the kernel's own
dtypes round, on the same inputs, plus one rounding of the tensor's dtype (docs/design.md, section 6). Rounding depends
on the order of sums, and a small tensor's error on luck: the largest error of DRAWS draws counts, each with the state's
rows in another order and its values rounded on another grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from m2gen.problem import TORCH_DTYPE, Inputs
from m2gen.runtime import reference
from m2gen.runtime.reference import EXACT, Arithmetic
from m2gen.spec import ClipMode, Fp32Products, TanhMode
from m2gen.variant import Variant
from m2gen.verify.case import Case, Loss, TensorResult

FACTOR = 2.0
DRAWS = 4
FEW_TOKENS = 128
"""Up to this many tokens a tensor may be a handful of numbers, whose error is luck: they get twice the draws."""
APPROXIMATE_TANH_BITS = 11
"""``tanh.approx.f32`` has a relative error of up to 2^-11 (PTX ISA)."""
FUNCTION_BITS = 22
"""``ex2.approx.f32``, from which kernels make every other function, has one of up to 2^-22 (PTX ISA)."""
OPERANDS = ("q", "k", "v", "weight", "forget", "initial_state")
GATE_PARAMETERS = ("A_log", "dt_bias")
TENSORS = ("y", "state", "dq", "dk", "dv", "dweight", "dforget", "dinitial_state")

Operator = Callable[..., tuple[Tensor, Tensor]]
Arrange = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Oracle:
    """Exact float64 results and gradients by name, the budget of each tensor's relative error, and its dtype."""

    exact: Mapping[str, Tensor]
    budgets: Mapping[str, float]
    dtypes: Mapping[str, torch.dtype]


def oracle(variant: Variant, case: Case, inputs: Inputs, seed: int) -> Oracle:
    """Evaluate the reference in float64, and for budgets in the kernel's own dtypes with draws from ``seed``.

    The result depends on ``case.question`` alone, so one oracle serves every schedule of a variant, and every layout.
    """
    exact = differentiate(eager(variant, EXACT), inputs, case, dtype=torch.float64)
    draws = DRAWS * 2 if math.prod(case.problem.lead) <= FEW_TOKENS else DRAWS
    errors = [_drawn_errors(variant, inputs, case, exact, seed + i, nominal=i == 0) for i in range(draws)]
    dtypes = _dtypes(inputs, case, exact)
    budgets = {
        name: FACTOR * max(error[name] for error in errors) + torch.finfo(dtypes[name]).eps / 2 for name in exact
    }
    return Oracle(exact, budgets, dtypes)


def judge(given: Mapping[str, Tensor], known: Oracle) -> tuple[TensorResult, ...]:
    """Compare results and gradients with the oracle; a tensor of another dtype or shape is infinitely wrong."""
    return tuple(
        TensorResult(
            name,
            relative_error(out, known.exact[name]) if out.dtype is known.dtypes[name] else math.inf,
            known.budgets[name],
        )
        for name, out in given.items()
    )


def same(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[TensorResult, ...]:
    """Compare tensors bit by bit; a tensor that differs, or has a NaN, gets its relative error, which is over 0."""
    return tuple(
        TensorResult(
            name, 0.0 if torch.equal(out, expected[name]) else relative_error(out, expected[name]) or math.ulp(0.0), 0.0
        )
        for name, out in given.items()
    )


def relative_error(out: Tensor, ref: Tensor) -> float:
    """Return ‖out - ref‖ / ‖ref‖ in float64, or ‖out‖ if ref is 0 everywhere."""
    if out.shape != ref.shape:
        return math.inf
    norm = ref.double().norm().item()
    return float((out.double() - ref.double()).norm().item() / (norm or 1.0))


def own_arithmetic(variant: Variant) -> Arithmetic:
    """Return the roundings that the variant's kernels cannot avoid."""
    return Arithmetic(
        torch.float32,
        TORCH_DTYPE[variant.dtype],
        tf32=variant.products is Fp32Products.TF32,
        tanh_bits=APPROXIMATE_TANH_BITS if variant.tanh is TanhMode.APPROX else FUNCTION_BITS,
        gate_bits=FUNCTION_BITS,
    )


def eager(variant: Variant, arithmetic: Arithmetic) -> Operator:
    """Return the reference operator with the variant's clip mode and with ``arithmetic``."""

    def call(*operands: Any, **facts: Any) -> tuple[Tensor, Tensor]:
        total = variant.clip is ClipMode.TOTAL
        return reference.m2rnn(*operands, **facts, clamp_total=total, arithmetic=arithmetic)

    return call


def named_operands(inputs: Inputs) -> dict[str, Tensor]:
    """Return by name every operand that is given and can have a gradient."""
    every = {name: getattr(inputs, name) for name in (*OPERANDS, *GATE_PARAMETERS)}
    return {name: x for name, x in every.items() if x is not None}


def gate_of(inputs: Inputs) -> dict[str, Tensor]:
    """Return A_log and dt_bias by name if the variant computes its gate, else nothing."""
    every = {name: getattr(inputs, name) for name in GATE_PARAMETERS}
    return {name: x for name, x in every.items() if x is not None}


def call(operator: Operator, operands: Mapping[str, Tensor], inputs: Inputs, case: Case) -> tuple[Tensor, Tensor]:
    """Call ``operator`` on operands by name, with the offsets of ``inputs`` and the bound of ``case``."""
    gate = {name: operands[name] for name in GATE_PARAMETERS if name in operands}
    return operator(*(operands.get(name) for name in OPERANDS), inputs.cu_seqlens, clip=case.clip, **gate)


def differentiate(
    operator: Operator,
    inputs: Inputs,
    case: Case,
    *,
    dtype: torch.dtype | None = None,
    arrange: Arrange = torch.clone,
    wanted: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Return y, state and the gradients d<operand> of one call by name.

    Operands are cast to ``dtype`` if given, and laid out in memory by ``arrange``, as are the incoming gradients;
    ``wanted`` names the operands that require a gradient, all of them by default.
    """
    leaves = {name: arrange(x if dtype is None else x.to(dtype)) for name, x in named_operands(inputs).items()}
    differentiable = [name for name in leaves if wanted is None or name in wanted]
    for name in differentiable:
        leaves[name].requires_grad_()
    y, state = call(operator, leaves, inputs, case)
    outputs: list[tuple[Tensor, Tensor]] = []
    if case.loss is not Loss.STATE:
        outputs.append((y, arrange(inputs.dy.to(y.dtype))))
    if case.loss is not Loss.Y:
        outputs.append((state, arrange(inputs.dstate.to(state.dtype))))
    gradients = _gradients([pair for pair in outputs if pair[0].requires_grad], [leaves[x] for x in differentiable])
    named = {f"d{name}": gradient for name, gradient in zip(differentiable, gradients, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}


def _gradients(outputs: list[tuple[Tensor, Tensor]], leaves: list[Tensor]) -> Sequence[Tensor]:
    """Return the gradients of leaves, zeros for those that no output depends on, as in a call of no steps."""
    if not outputs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    results, incoming = zip(*outputs, strict=True)
    return torch.autograd.grad(results, leaves, incoming, materialize_grads=True)


def _dtypes(inputs: Inputs, case: Case, exact: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Return the dtype of every result: y has q's, the state float32 unless narrow, gradients their operands'."""
    operands = {f"d{name}": x.dtype for name, x in named_operands(inputs).items()}
    state = torch.bfloat16 if case.narrow_state else torch.float32
    every = {"y": inputs.q.dtype, "state": state, **operands}
    return {name: every[name] for name in exact}


def _drawn_errors(
    variant: Variant, inputs: Inputs, case: Case, exact: Mapping[str, Tensor], seed: int, *, nominal: bool
) -> dict[str, float]:
    """Return every tensor's error in the kernel's own dtypes, with the state's rows in an order drawn from ``seed``.

    Values are rounded on a grid drawn from ``seed`` as well, except in the ``nominal`` draw.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(inputs.q.shape[-1], generator=generator).to(inputs.q.device)
    grid = 1.0 if nominal else 2.0 ** torch.rand((), generator=generator).item()
    kept = torch.bfloat16 if case.narrow_state else None
    operator = eager(variant, replace(own_arithmetic(variant), kept=kept, grid=grid))
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
        for name, out in differentiate(operator, reordered, case).items()
    }
