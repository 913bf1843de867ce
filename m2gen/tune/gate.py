"""Before the clock: every output and gradient within its budget on several problems, and bits that repeat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from m2gen.db import Failure, Reason, TensorError
from m2gen.kernels.outputs import varying
from m2gen.problem import Gates, Inputs, Problem
from m2gen.schedule import Schedule
from m2gen.spec import Objective
from m2gen.tune.candidate import Call
from m2gen.variant import Variant
from m2gen.verify import Case, Loss, Oracle, TensorResult, oracle
from m2gen.verify.oracle import judge, same
from m2gen.verify.subject import inputs_of, poisoned

STEPS = 144
"""Steps of the plain problems: beyond every checkpoint interval that is searched, and a multiple of 16, as the sizes
that are timed usually are, since Triton compiles another kernel for strides that are none."""
RESULT = {"df": "dforget"}
"""Names of gradients where they are not those of the kernel's arguments."""


@dataclass(frozen=True)
class Question:
    """One problem of the gate, and the seed of its inputs."""

    case: Case
    seed: int


def questions(variant: Variant, steps: int, *, held_out: bool = False) -> tuple[Question, ...]:
    """Return the gate's problems for a variant: those of every trial, or those that only finalists see.

    Plain calls as they are timed, whose incoming gradients are within and over the clip bound; and a packed batch of
    ragged lengths from initial states, f near 1 in float32, with a gradient of the final states.
    """
    shift = 100 if held_out else 0
    sequences, length = (1, 2 * steps) if held_out else (2, steps)
    plain = Problem(sequences, length)
    lengths = (17, steps + 5, 0, 1, steps // 2) if held_out else (0, 5, steps - 1, 1)
    packed = Problem(0, 0, lengths=lengths, initial_state=True)
    return (
        Question(Case("plain", plain, Loss.Y), shift),
        Question(Case("plain_clipped", plain, Loss.Y, dy_scale=3.0), shift + 1),
        Question(Case("packed_slow", packed, Loss.BOTH, gates=Gates.SLOW), shift + 2),
    )


@lru_cache(maxsize=8)
def answered(variant: Variant, question: Question, device: torch.device) -> tuple[Inputs, Oracle]:
    """Return a question's inputs and the oracle's answer, worked out once for all candidates."""
    inputs = inputs_of(variant, question.case, question.seed, device)
    return inputs, oracle(variant, question.case, inputs, question.seed)


def prepare(variant: Variant, asked: Iterable[Question], device: torch.device) -> None:
    """Work out the answers before the first candidate needs them."""
    for question in asked:
        answered(variant, question, device)
    with poisoned():  # whose first use imports a compiler
        pass


@dataclass(frozen=True)
class Verdict:
    """The worst error of every tensor, and why the candidate must not be used, if so."""

    errors: tuple[TensorError, ...]
    failure: Failure | None = None


@dataclass(frozen=True)
class Candidate:
    """A loaded candidate."""

    module: ModuleType
    variant: Variant
    schedule: Schedule
    objective: Objective


def pass_gate(candidate: Candidate, asked: Iterable[Question], device: torch.device) -> Verdict:
    """Hold a candidate against the oracle on every problem; the first one that it fails ends the gate."""
    worst: dict[str, TensorResult] = {}
    for question in asked:
        for result in _judged(candidate, question, device):
            if not result.passed:
                message = f"{result.tensor} of {question.case.name} {result.verdict}"
                return Verdict(_errors(worst), Failure(Reason.WRONG, message))
            if result.budget and (result.tensor not in worst or result.part > worst[result.tensor].part):
                worst[result.tensor] = result
    return Verdict(_errors(worst))


def _errors(worst: dict[str, TensorResult]) -> tuple[TensorError, ...]:
    return tuple(TensorError(name, result.error, result.budget) for name, result in sorted(worst.items()))


def call_of(module: ModuleType, objective: Objective, case: Case, inputs: Inputs) -> Call:
    """Return the call that a case makes of a candidate."""
    return Call(module, inputs, objective, case.clip, case.loss is Loss.BOTH)


def _judged(candidate: Candidate, question: Question, device: torch.device) -> Iterator[TensorResult]:
    """Yield every tensor's error, then whether a second run has the bits that the schedule claims."""
    inputs, known = answered(candidate.variant, question, device)
    call = call_of(candidate.module, candidate.objective, question.case, inputs)
    with poisoned():
        first = call.results()
    yield from judge(first, known)
    with poisoned():
        again = call.results()
    yield from same(_claimed(again, candidate), _claimed(first, candidate))


def _claimed(results: dict[str, Tensor], candidate: Candidate) -> dict[str, Tensor]:
    """Return the tensors whose bits the schedule claims to repeat."""
    names = {RESULT.get(name, name) for name in varying(candidate.variant, candidate.schedule)}
    return {name: x for name, x in results.items() if name not in names}
