"""The page of what several GPUs should take: its tables are the tool's, and a run fills their empty columns."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from support import ROOT

from m2gen.bench.ranks.entries import Link, RankCase, RankDocument, RankRow
from m2gen.bench.ranks.kinds import Form
from m2gen.db import Environment

PAGE = ROOT / "docs" / "scale.md"
GPUS = sorted((ROOT / "docs" / "data").glob("ranks_*_h200.json"))
CPUS = sorted((ROOT / "docs" / "data").glob("ranks_*_cpus.json"), key=lambda path: int(path.stem.split("_")[1]))


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """Import the tool."""
    spec = importlib.util.spec_from_file_location("scale_tables", ROOT / "tools" / "scale_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_tool_writes(tool: ModuleType, tmp_path: Path) -> None:
    """Predictions and results on CPUs in docs are those of what is committed."""
    copy = tmp_path / "scale.md"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    measured = [*(("--from", path) for path in GPUS), *(("--cpus", path) for path in CPUS)]
    tool.main([str(copy), *(str(argument) for pair in measured for argument in pair)])
    assert copy.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_every_case_of_the_command_is_predicted(tool: ModuleType) -> None:
    """Each form that the command runs has a prediction, which is no less than an even share of one GPU's time."""
    known = tool.one_gpu()
    for ranks in tool.GPUS:
        found = tool.forecasts(ranks, known)
        forms = set(Form) - {Form.ONE} - ({Form.MESH} if ranks == 2 else set())
        assert {each.case.form for each in found} == forms
        assert all(0 < each.efficiency <= 1.001 for each in found)
        assert all(each.memory > 0 for each in found)


def test_a_run_fills_the_measured_columns(tool: ModuleType) -> None:
    """Measured times stand beside predictions, with how far off these are; failures say why; the rest stays empty."""
    known = tool.one_gpu()
    case, other = (each.case for each in tool.forecasts(4, known)[:2])
    first = tool.forecast(case, 4, known, tool.LINK)
    one = RankCase(case.shape, Form.ONE, case.batch, case.seq)
    row = RankRow(case.shape.name, Form.ONE, case.batch, case.seq, 1, step_ms=4 * first.step_ms)
    found = replace(
        row, form=case.form, ranks=4, step_ms=2 * first.step_ms, communication_ms=first.step_ms, peak_bytes=3 * 10**9
    )
    wrong = replace(found, form=other.form, step_ms=None, failure="dx must be within its budget")
    here = Environment("sm_90", "NVIDIA H200", 132, "1", "2.11.0", "3.6.0", "12.8")
    document = RankDocument(here, "nccl", Link(300.0, 0.02), (one, case, other), (row, found, wrong))
    lines = list(tool.over_gpus(4, known, [document]))
    text = "\n".join(lines)
    assert "measurements on 4 x NVIDIA H200" in text
    assert "300 GB/s and 20 µs." in text
    assert f"| {tool.ms_text(2 * first.step_ms)} |  | 50% | 50% | 3.00 | -50% |" in text
    assert "| dx must be within its budget |  |  |  |  |  |" in text
    assert sum(line.endswith("|  |  |  |  |  |  |") for line in lines) == len(tool.forecasts(4, known)) - 2
    assert "not measured" in "\n".join(tool.over_gpus(8, known, [document]))
