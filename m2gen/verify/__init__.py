"""Every output and gradient of a generated package against the float64 reference, within derived budgets.

``oracle`` says what a problem's exact results are and how far off each may be; ``judge`` holds results against it, as
often as there are candidates. ``cases`` lists what a variant is put through, and ``run_case`` does one of them.
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
