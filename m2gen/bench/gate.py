"""Before the clock: every output and gradient of a contender within its budget against float64."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from m2gen.bench.contest import Contender, Entry
from m2gen.bench.operators import Stepper, sequence_operator, stepper
from m2gen.bench.words import Kind
from m2gen.db import Failure, Reason
from m2gen.problem import Inputs, Problem
from m2gen.tune.gate import STEPS, Question, answered, questions
from m2gen.variant import Variant
from m2gen.verify import Case, Loss, differentiate, judge
from m2gen.verify.oracle import gate_of
from m2gen.verify.subject import poisoned

TOKENS = 4
"""That decoding is judged on, one after the other."""
DECODING = "decoding"
SEED = 200


def failure_of(entry: Entry, device: torch.device) -> Failure | None:
    """Return why an entry must not be timed, or None; worked out once for all workloads that ask the same."""
    return _failure(entry.contender, entry.workload.variant, _questions(entry), device)


def _questions(entry: Entry) -> tuple[Question, ...]:
    """Return the problems of an entry: those of tuning, packed ones for generated operators alone.

    ``torch.compile`` unrolls a sequence, so that it has the size that is timed; decoding has its batch.
    """
    workload = entry.timed
    if workload.call.decodes:
        problem = Problem(workload.batch, TOKENS, initial_state=True)
        case = Case(DECODING, problem, Loss.Y, narrow_state=workload.call.narrow_state)
        return (Question(case, SEED),)
    if entry.contender.kind is Kind.COMPILED:
        problem = Problem(workload.batch, workload.seq)
        return (Question(Case("plain_clipped", problem, Loss.Y, dy_scale=3.0), SEED + 1),)
    asked = questions(workload.variant, STEPS)
    return asked if entry.contender.kind.generated else tuple(q for q in asked if q.case.problem.lengths is None)


@lru_cache(maxsize=256)
def _failure(
    contender: Contender, variant: Variant, asked: tuple[Question, ...], device: torch.device
) -> Failure | None:
    for question in asked:
        inputs, known = answered(variant, question, device)
        with poisoned() if contender.kind.generated else nullcontext():
            given = _results(contender, variant, question.case, inputs)
        for result in judge(given, known):
            if not result.passed:
                return Failure.of(Reason.WRONG, f"{result.tensor} of {question.case.name} {result.verdict}")
    return None


def _results(contender: Contender, variant: Variant, case: Case, inputs: Inputs) -> Mapping[str, Tensor]:
    if case.name == DECODING:
        return _decoded(stepper(contender, variant), inputs, case)
    return differentiate(sequence_operator(contender, variant), inputs, case)


def _decoded(step: Stepper, inputs: Inputs, case: Case) -> Mapping[str, Tensor]:
    """Return y of every token, one step after the other, and the state after the last."""
    gate = gate_of(inputs)
    assert inputs.initial_state is not None
    state = inputs.initial_state.to(torch.bfloat16 if case.narrow_state else torch.float32, copy=True)
    outputs = []
    with torch.no_grad():
        for t in range(inputs.q.shape[1]):
            token = [x[:, t] for x in (inputs.q, inputs.k, inputs.v)]
            y, state = step(*token, inputs.weight, inputs.forget[:, t], state, **gate)
            outputs.append(y)
    return {"y": torch.stack(outputs, 1), "state": state}
