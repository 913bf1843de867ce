"""Check every output and gradient of a candidate before it is timed: within its budget, with bits that repeat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from m2gen.kernels.lowering import Lowering
from m2gen.measure.checks import SeededCase, Verdict, check
from m2gen.problem import Inputs
from m2gen.schedule import Schedule
from m2gen.spec import Objective
from m2gen.tune.candidate import KernelCall
from m2gen.variant import Variant
from m2gen.verify import Case, Loss, Oracle, TensorResult, judge
from m2gen.verify.oracle import same
from m2gen.verify.subject import poisoned

RESULT = {"df": "dforget"}
"""Names of gradients that differ from those of the kernel's arguments."""


@dataclass(frozen=True)
class Candidate:
    """A candidate with its loaded kernels."""

    module: ModuleType
    variant: Variant
    schedule: Schedule
    objective: Objective


def check_candidate(candidate: Candidate, asked: Iterable[SeededCase], device: torch.device) -> Verdict:
    """Judge a candidate by the oracle on every case; the first failure ends the check."""

    def judged(case: Case, inputs: Inputs, known: Oracle) -> Iterator[TensorResult]:
        call = call_of(candidate.module, candidate.objective, case, inputs)
        with poisoned():
            first = call.results()
        yield from judge(first, known)
        with poisoned():
            again = call.results()
        yield from same(_deterministic(again, candidate), _deterministic(first, candidate))

    return check(candidate.variant, asked, judged, device)


def call_of(module: ModuleType, objective: Objective, case: Case, inputs: Inputs) -> KernelCall:
    """Return the call that a case makes of a candidate."""
    return KernelCall(module, inputs, objective, case.clip, case.loss is Loss.BOTH)


def _deterministic(results: dict[str, Tensor], candidate: Candidate) -> dict[str, Tensor]:
    """Return the tensors that the schedule claims to be deterministic."""
    names = {RESULT.get(name, name) for name in Lowering(candidate.variant, candidate.schedule).varying}
    return {name: x for name, x in results.items() if name not in names}
