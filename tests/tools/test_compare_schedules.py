"""The tool that times named schedules side by side, on a scripted timer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import scripted
from scripted import WRONG, Script
from support import ROOT

from m2gen.errors import ScheduleError
from m2gen.kernels.compile import load_module

tool = load_module(ROOT / "tools" / "compare_schedules.py", "m2gen_test_compare_schedules")
SLUGS = ("mma_f64x2u8a_b64x2c8atx_i8_ptx", "portable_f32x1u4p_b32x1c2p_i16_ptx")


def compared(monkeypatch: pytest.MonkeyPatch, script: Script, *schedules: str) -> None:
    """Run the tool's command line on the 7B layer."""
    monkeypatch.setattr(tool, "this_bench_context", scripted.given(script))
    spec = str(ROOT / "specs" / "h200.yaml")
    monkeypatch.setattr(sys, "argv", ["compare_schedules.py", spec, "m2rnn_7b", "1", *schedules])
    tool.main()


def test_every_schedule_has_a_line(monkeypatch, capsys, tmp_path: Path) -> None:
    """Named as they are asked for, the default by its name; the workload is the one of that number."""
    monkeypatch.setenv("M2GEN_CACHE_DIR", str(tmp_path))
    compared(monkeypatch, Script(), "default", SLUGS[1])
    title, _, *table = capsys.readouterr().out.splitlines()
    assert title == "m2rnn_7b bf16 B1 S16384"
    assert [row.split("|")[1].strip() for row in table[2:]] == [f"`{slug}`" for slug in SLUGS]
    assert all(float(row.split("|")[2].split("(")[0]) > 0 for row in table[2:])


def test_what_fails_the_gate_has_no_time(monkeypatch, capsys, tmp_path: Path) -> None:
    """A schedule that fails the check has the reason in its line."""
    monkeypatch.setenv("M2GEN_CACHE_DIR", str(tmp_path))
    compared(monkeypatch, Script(broken={"default": WRONG}), SLUGS[0])
    row = capsys.readouterr().out.splitlines()[-1]
    assert row == f"| `{SLUGS[0]}` | {WRONG.message} | | | |"


def test_a_layer_that_is_not_there(monkeypatch, capsys) -> None:
    """An error names those that are."""
    monkeypatch.setattr(
        sys, "argv", ["compare_schedules.py", str(ROOT / "specs" / "h200.yaml"), "m2rnn", "0", "default"]
    )
    with pytest.raises(SystemExit):
        tool.main()
    assert "layer must be among m2rnn_7b, m2rnn_410m, square, odd, square_16, got 'm2rnn'" in capsys.readouterr().err


def test_a_schedule_that_is_not_valid_is_an_error(monkeypatch, tmp_path: Path) -> None:
    """An invalid schedule is an error before anything is timed."""
    monkeypatch.setenv("M2GEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ScheduleError, match="interval must be a multiple"):
        compared(monkeypatch, Script(), "portable_f32x1u4a_b32x1c2a_i3_ptx")


def test_packed_workloads_are_timed_packed(monkeypatch, capsys, tmp_path: Path) -> None:
    """A spec's workload is timed as the spec has it."""
    monkeypatch.setenv("M2GEN_CACHE_DIR", str(tmp_path))
    script = Script()
    monkeypatch.setattr(tool, "this_bench_context", scripted.given(script))
    monkeypatch.setattr(
        sys, "argv", ["compare_schedules.py", str(ROOT / "specs" / "tail.yaml"), "short", "0", "default"]
    )
    tool.main()
    assert script.asked[0].entry.workload.packed
    assert capsys.readouterr().out.startswith("short bf16 2048 packed, S1 to 200")
