"""Deterministic calls have the same bits in every run."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from m2gen.verify.case import TensorResult
from m2gen.verify.oracle import same
from m2gen.verify.subject import CaseContext

GPU_REPEATS = 25
INTERPRETER_REPEATS = 3


def repeated(subject: CaseContext) -> Iterable[TensorResult]:
    """Compare repeated calls bit by bit, with determinism asked of the operator or of torch (by ``poisoned``)."""
    repeats = GPU_REPEATS if subject.device.type == "cuda" else INTERPRETER_REPEATS
    asked, ambient = (partial(subject.package.m2rnn, deterministic=mode) for mode in (True, None))
    first = subject.differentiate(asked)
    worst: dict[str, TensorResult] = {}
    for index in range(1, repeats):
        again = subject.differentiate(ambient if index % 3 == 2 else asked)
        for result in same(again, first):
            if result.tensor not in worst or not result.passed:
                worst[result.tensor] = result
    return worst.values()
