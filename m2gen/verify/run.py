"""Run one case and report whatever happens in it."""

from __future__ import annotations

import time

import torch

from m2gen.spec.problems import printable
from m2gen.variant import Variant
from m2gen.verify.case import Case, CaseReport, TensorResult, report
from m2gen.verify.checks import CHECKS
from m2gen.verify.subject import CaseContext, GeneratedPackage

LONGEST_MESSAGE = 400


def run_case(package: GeneratedPackage, variant: Variant, case: Case, seed: int, device: torch.device) -> CaseReport:
    """Run one case of an imported package and judge its results; an exception makes it a failed case."""
    start = time.monotonic()
    results: tuple[TensorResult, ...] = ()
    failure = ""
    try:
        results = tuple(CHECKS[case.check](CaseContext(package, variant, case, seed, device)))
        if not results:
            failure = "nothing was judged"
    except Exception as error:  # raised by a compiler, a driver or a check: only this case fails
        failure = one_line(error)
    return report(variant, case, seed, results, time.monotonic() - start, failure)


def one_line(error: Exception) -> str:
    """Return an exception's type and message in one line of bounded length."""
    text = printable(" ".join(f"{type(error).__name__}: {error}".split()))
    return (
        text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"
    )
