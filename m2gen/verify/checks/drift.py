"""Long sequences that hardly forget, on which a state in the operands' dtype loses the recurrence."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from m2gen.problem import TORCH_DTYPE
from m2gen.runtime.reference import Arithmetic
from m2gen.verify.case import TensorResult
from m2gen.verify.oracle import call, eager, judge, named_operands, relative_error
from m2gen.verify.subject import CaseContext


def drift(subject: CaseContext) -> Iterable[TensorResult]:
    """Judge a call, and show that the eager loop with a state in the operands' dtype is over the same budgets."""
    yield from judge(subject.differentiate(), subject.known)
    narrow = TORCH_DTYPE[subject.variant.dtype]
    loop = eager(subject.variant, Arithmetic(narrow, narrow))
    with torch.no_grad():
        y, state = call(loop, named_operands(subject.inputs), subject.inputs, subject.case)
    known = subject.known
    for name, out in (("y", y), ("state", state)):
        error = relative_error(out, known.exact[name])
        yield TensorResult(f"{name}_of_{subject.variant.dtype}_loop", error, known.budgets[name], over=True)
