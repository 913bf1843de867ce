"""The tool that compares schedules' errors with those of the portable templates, on scripted errors."""

from __future__ import annotations

import sys

import pytest
import scripted
from scripted import Script
from support import ROOT

from m2gen.kernels.compile import load_module
from m2gen.measure.checks import STEPS, SeededCase, seeded_cases
from m2gen.schedule import Family, Schedule
from m2gen.variant import Variant, parse_variant

tool = load_module(ROOT / "tools" / "compare_errors.py", "m2gen_test_compare_errors")


def compared(monkeypatch: pytest.MonkeyPatch, factor: float, layer: str = "m2rnn_7b") -> int:
    """Run the tool's command line, where kernels of mma err ``factor`` times as much as portable ones."""

    def errors(variant: Variant, schedule: Schedule, asked: SeededCase) -> dict[str, float]:
        portable = {"y": 1e-3, "dq": 2e-3}
        return {name: error * (factor if schedule.family is Family.MMA else 1) for name, error in portable.items()}

    monkeypatch.setattr(tool, "errors", errors)
    monkeypatch.setattr(tool, "this_bench_context", scripted.given(Script()))
    monkeypatch.setattr(sys, "argv", ["compare_errors.py", str(ROOT / "specs" / "h200.yaml"), layer, "default"])
    status: int = tool.main()
    return status


def test_every_problem_and_tensor_has_a_line(monkeypatch, capsys) -> None:
    """The portable error and the other's multiple of it, for the check's problems and those it holds back."""
    assert compared(monkeypatch, 1.05) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| p")][1:]
    variant = "k64_v16_q1_k1_v132_f132_w132_bf16_carry_approx"
    assert lines[0] == variant
    asked = [seeded_cases(parse_variant(variant), STEPS, held_out=held_out) for held_out in (False, True)]
    assert len(rows) == 2 * sum(map(len, asked))
    assert all("1.050" in row for row in rows)
    assert lines[-1] == "The largest multiple is 1.050."


def test_more_than_a_tenth_fails(monkeypatch) -> None:
    """An error that is more than a tenth larger fails the tool, for any schedule and problem."""
    assert compared(monkeypatch, 1.11) == 1


def test_a_layer_that_is_not_there(monkeypatch, capsys) -> None:
    """An error names those that are."""
    with pytest.raises(SystemExit):
        compared(monkeypatch, 1.0, "m2rnn")
    assert "layer must be among m2rnn_7b, m2rnn_410m, square, odd, square_16, got 'm2rnn'" in capsys.readouterr().err
