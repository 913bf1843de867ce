"""Check every output and gradient of a generated package against the float64 reference, within derived budgets.

``oracle`` gives a problem's exact results and their budgets; ``judge`` compares any number of candidates with them.
``cases`` lists the cases of a variant, and ``run_case`` runs one.
"""

from m2gen.problem import Gates, Weights, make_inputs
from m2gen.verify.case import Case, CaseReport, Check, Feature, Layout, Loss, TensorResult, report
from m2gen.verify.matrix import cases, only, quick
from m2gen.verify.oracle import (
    FACTOR,
    GATE_PARAMETERS,
    OPERANDS,
    TENSORS,
    Operator,
    Oracle,
    differentiate,
    judge,
    oracle,
)
from m2gen.verify.run import failed_case, run_case
from m2gen.verify.subject import GeneratedPackage

__all__ = [
    "FACTOR",
    "GATE_PARAMETERS",
    "OPERANDS",
    "TENSORS",
    "Case",
    "CaseReport",
    "Check",
    "Feature",
    "Gates",
    "GeneratedPackage",
    "Layout",
    "Loss",
    "Operator",
    "Oracle",
    "TensorResult",
    "Weights",
    "cases",
    "differentiate",
    "failed_case",
    "judge",
    "make_inputs",
    "only",
    "oracle",
    "quick",
    "report",
    "run_case",
]
