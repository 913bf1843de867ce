"""Check every output and gradient of a generated package against the float64 reference, within derived budgets.

``oracle`` gives a problem's exact results and their budgets; ``judge`` compares any number of candidates with them.
``cases`` lists the cases of a variant, and ``run_case`` runs one.
"""

from m2gen.verify.case import Case, CaseReport, Check, Feature, Layout, Loss, TensorResult, report
from m2gen.verify.matrix import cases, only, quick
from m2gen.verify.oracle import (
    FACTOR,
    OPERANDS,
    TENSORS,
    Operator,
    Oracle,
    differentiate,
    judge,
    oracle,
)
from m2gen.verify.run import one_line, run_case

__all__ = [
    "FACTOR",
    "OPERANDS",
    "TENSORS",
    "Case",
    "CaseReport",
    "Check",
    "Feature",
    "Layout",
    "Loss",
    "Operator",
    "Oracle",
    "TensorResult",
    "cases",
    "differentiate",
    "judge",
    "one_line",
    "only",
    "oracle",
    "quick",
    "report",
    "run_case",
]
