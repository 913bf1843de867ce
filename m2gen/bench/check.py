"""Check every output and gradient of an implementation against float64 before it is timed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from m2gen.bench.entries import Entry, Implementation
from m2gen.bench.kinds import Kind
from m2gen.bench.operators import Stepper, pooled, sequence_operator, stepper
from m2gen.db import Failure
from m2gen.measure.checks import STEPS, SeededCase, check, seeded_cases
from m2gen.problem import Inputs, Problem
from m2gen.variant import Variant
from m2gen.verify import Case, Loss, Oracle, TensorResult, differentiate, judge
from m2gen.verify.oracle import gate_of
from m2gen.verify.subject import poisoned

TOKENS = 4
"""Number of tokens, one after the other, on which decoding is judged."""
DECODING = "decoding"
SEED = 200


def failure_of(entry: Entry, device: torch.device) -> Failure | None:
    """Return why an entry must not be timed, or None; computed once for all workloads with the same question."""
    return _failure(entry.implementation, entry.workload.variant, _cases(entry), device, entry.workload.call.pooled)


def _cases(entry: Entry) -> tuple[SeededCase, ...]:
    """Return the cases of an entry: those of tuning, packed ones only for generated operators.

    ``torch.compile`` unrolls a sequence, so its case has the size that is timed; decoding has its own batch.
    """
    workload = entry.timed
    if workload.call.decodes:
        problem = Problem(workload.batch, TOKENS, initial_state=True)
        case = Case(DECODING, problem, Loss.Y, narrow_state=workload.call.narrow_state)
        return (SeededCase(case, SEED),)
    if entry.implementation.kind is Kind.COMPILED:
        problem = Problem(workload.batch, workload.seq)
        return (SeededCase(Case("plain_clipped", problem, Loss.Y, dy_scale=3.0), SEED + 1),)
    asked = seeded_cases(workload.variant, STEPS)
    return asked if entry.implementation.kind.generated else tuple(a for a in asked if a.case.problem.lengths is None)


@lru_cache(maxsize=256)
def _failure(
    implementation: Implementation,
    variant: Variant,
    asked: tuple[SeededCase, ...],
    device: torch.device,
    in_slots: bool = False,
) -> Failure | None:
    def judged(case: Case, inputs: Inputs, known: Oracle) -> tuple[TensorResult, ...]:
        with poisoned() if implementation.kind.generated else nullcontext():
            given = _results(implementation, variant, case, inputs, in_slots)
        return judge(given, known)

    return check(variant, asked, judged, device).failure


def _results(
    implementation: Implementation, variant: Variant, case: Case, inputs: Inputs, in_slots: bool
) -> Mapping[str, Tensor]:
    if case.name == DECODING:
        return _decoded(stepper(implementation, variant), inputs, case, in_slots)
    return differentiate(sequence_operator(implementation, variant), inputs, case)


def _decoded(step: Stepper, inputs: Inputs, case: Case, in_slots: bool) -> Mapping[str, Tensor]:
    """Return y of every token, one step after the other, and the state after the last."""
    options: dict[str, Tensor] = dict(gate_of(inputs))
    assert inputs.initial_state is not None
    state = inputs.initial_state.to(torch.bfloat16 if case.narrow_state else torch.float32, copy=True)
    if in_slots:
        state, options["indices"] = pooled(state)
    outputs = []
    with torch.no_grad():
        for t in range(inputs.q.shape[1]):
            token = [x[:, t] for x in (inputs.q, inputs.k, inputs.v)]
            y, state = step(*token, inputs.weight, inputs.forget[:, t], state, **options)
            outputs.append(y)
    if in_slots:
        state = state[options["indices"].long()]
    return {"y": torch.stack(outputs, 1), "state": state}
