"""Run m2gen's commands in tests, with small results for the stages that tests replace."""

from __future__ import annotations

import json
from typing import Any

from support import ROOT
from typer.testing import CliRunner

from m2gen.cli.app import app
from m2gen.kernels.resources import Resources
from m2gen.pipeline import CheckRow, VerifyOutcome
from m2gen.verify import CaseReport, Feature, TensorResult

TINY = str(ROOT / "specs" / "tiny.yaml")
KEY = "k16_v16_q1_k1_v2_f2_w2_fp32_carry_exact"
SPEC = """schema: 1
name: one
targets: sm_90
layers:
  base: {head_dim: 16, state_expansion: 16, heads: {q: 1, k: 1, v: 1, f: 1, w: 1}, dtypes: fp32}
"""


def run(*arguments: str) -> Any:
    """Run a command in this process."""
    return CliRunner().invoke(app, list(arguments))


def fails(status: int, *arguments: str) -> str:
    """Return the one line that a failing command prints to standard error."""
    result = run(*arguments)
    lines = result.stderr.splitlines()
    assert result.exit_code == status, result.output
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    return str(lines[0])


def document(*arguments: str, status: int = 0) -> Any:
    """Return the JSON document that is all a command prints to standard output."""
    result = run(*arguments, "--json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def row(*problems: str) -> CheckRow:
    """Return a kernel that fits, or that has problems."""
    return CheckRow(KEY, "forward", "sm_90", "slug", Resources(64, 0, 1024, 9000), problems, name="base fp32")


def outcome(*errors: float, failure: str = "") -> VerifyOutcome:
    """Return a verification of one case whose tensors have these errors and a budget of 1e-3."""
    results = tuple(TensorResult(f"t{i}", error, 1e-3) for i, error in enumerate(errors))
    case = (Feature.RECURRENCE, "ragged", 7)
    report = CaseReport(KEY, "fp32", *case, results, 0.25, failure, "tiny.yaml", name="base fp32")
    return VerifyOutcome("interpreter", (report,), 0.5)
