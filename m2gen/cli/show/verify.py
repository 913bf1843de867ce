"""Print the results of ``m2gen verify``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2gen.cli.files import write_output
from m2gen.cli.show.names import counted
from m2gen.cli.show.report import junit, print_json
from m2gen.cli.show.table import Table, print_tables
from m2gen.errors import EmitError, listed
from m2gen.pipeline import VerifyOutcome, failed, failure_lines, reproduce

if TYPE_CHECKING:
    from m2gen.verify import CaseReport, TensorResult

FEATURE_COLUMNS = ("feature", "cases", "seconds", "result", "nearest to its budget")
TENSOR_COLUMNS = ("tensor", "error", "budget", "of budget", "case", "layer")


def show_verify(outcome: VerifyOutcome, *, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Print a line for each feature, and each tensor's worst error and budget; return 1 if anything failed."""
    status = 0 if outcome.passed else 1
    if as_json:
        print_json(_document(outcome))
        return status
    if not quiet:
        print_tables(verify_tables(outcome, verbose=verbose))
        print()
    for line in listed(failure_lines(outcome)):
        print(f"m2gen: {line}", file=sys.stderr)
    print(_total(outcome))
    return status


def verify_tables(outcome: VerifyOutcome, *, verbose: bool) -> list[Table]:
    """Return the table of features and that of errors."""
    reports = outcome.reports
    features = dict.fromkeys(report.feature for report in reports)
    each = [_feature_row([r for r in reports if r.feature == feature]) for feature in features]
    columns = (*TENSOR_COLUMNS, "variant", "slug") if verbose else TENSOR_COLUMNS
    return [
        Table(f"Verified on: {outcome.backend}", FEATURE_COLUMNS, each),
        Table("Errors", columns, _tensor_rows(reports, verbose=verbose)),
    ]


def _total(outcome: VerifyOutcome) -> str:
    tensors = sum(len(report.results) for report in outcome.reports)
    broken = sum(bool(report.failure) for report in outcome.reports)
    over = len(failed(outcome.reports)) - broken
    counts = f"{counted(len(outcome.reports), 'case')}, {counted(tensors, 'tensor')}"
    return f"{counts}, {over} over budget, {broken} without results, {outcome.seconds:.1f} s"


def _feature_row(reports: Sequence[CaseReport]) -> tuple[Any, ...]:
    """Return a feature's line, with the sum of its cases' seconds, which run in parallel."""
    bad = sum(not report.passed for report in reports)
    judged = [(result.part, report, result) for report in reports for result in report.results if not result.over]
    part, report, result = max(judged, key=lambda found: _badness(found[0]), default=(0.0, reports[0], None))
    near = f"{part:.0%}: {result.tensor} of {report.case}, {_layer(report)}" if result and part else ""
    seconds = f"{sum(report.seconds for report in reports):.1f}"
    verdict = f"{bad} FAILED" if bad else "ok"
    return (str(reports[0].feature), len(reports), seconds, verdict, near or ("same bits" if judged else ""))


def _layer(report: CaseReport) -> str:
    """Return the variant's name, with the dtype of its products if the name does not have it."""
    return report.name if report.dtype in report.name.split() else f"{report.name} ({report.dtype})"


def _badness(part: float) -> float:
    return math.inf if math.isnan(part) else part


def _tensor_rows(reports: Sequence[CaseReport], *, verbose: bool) -> list[tuple[str, ...]]:
    """Return for each dtype and tensor the row nearest to its budget, without bitwise ones; all with ``verbose``."""
    worst: dict[tuple[str, ...], tuple[float, tuple[str, ...]]] = {}
    for report in reports:
        for result in report.results:
            if not verbose and not result.budget and result.passed:
                continue
            row = _tensor_row(report, result)
            key: tuple[str, ...] = (report.dtype, result.tensor)
            if verbose:
                row, key = (*row, report.variant, report.schedule), (*key, report.case, report.variant, report.schedule)
            part = _badness(result.part)
            if key not in worst or part > worst[key][0]:
                worst[key] = (part, row)
    return [row for _, row in worst.values()]


def _tensor_row(report: CaseReport, r: TensorResult) -> tuple[str, ...]:
    """Return a tensor's line; a control must be over its budget, all others within."""
    verdict = (" control" if r.passed else " NOT OVER") if r.over else ("" if r.passed else " OVER")
    return (r.tensor, f"{r.error:.2e}", f"{r.budget:.2e}", f"{r.part:.0%}{verdict}", report.case, _layer(report))


def _document(outcome: VerifyOutcome) -> dict[str, Any]:
    """Return the document as JSON values, with NaN and infinities as strings."""
    features: dict[str, dict[str, Any]] = {}
    for report in outcome.reports:
        line = features.setdefault(report.feature, {"cases": 0, "tensors": 0, "failed": 0, "seconds": 0.0})
        line["cases"] += 1
        line["tensors"] += len(report.results)
        line["failed"] += not report.passed
        line["seconds"] += report.seconds
    return {
        "backend": outcome.backend,
        "passed": outcome.passed,
        "seconds": outcome.seconds,
        "features": features,
        "cases": [_case(report, outcome.options) for report in outcome.reports],
    }


def _case(report: CaseReport, options: str) -> dict[str, Any]:
    results = [
        {**asdict(r), "error": _number(r.error), "budget": _number(r.budget), "passed": r.passed}
        for r in report.results
    ]
    return {**asdict(report), "results": results, "passed": report.passed, "reproduce": reproduce(report, options)}


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def write_junit(path: Path, title: str, outcome: VerifyOutcome) -> None:
    """Write the JUnit document of a verification; raises EmitError if ``path`` cannot be written."""
    text = junit(title, outcome.reports, [reproduce(report, outcome.options) for report in outcome.reports])
    write_output("--junit", path, text, EmitError)
