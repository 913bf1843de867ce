"""What maintainers' tools say of what they cannot read: one line each, with what it must be, and no traceback."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from support import ROOT

LAYERS = str(ROOT / "docs" / "data" / "layers_h200.json")
SEARCH = str(ROOT / "docs" / "data" / "h100_m2rnn_7b_b4_s4096.jsonl.gz")
PAGE = str(ROOT / "docs" / "model-step.md")
SPEC = str(ROOT / "specs" / "h200.yaml")
REFUSED = [
    (("layer_tables", "none.json", PAGE), "layer_tables: none.json must be readable: No such file"),
    (("layer_tables", LAYERS, "page.md"), "layer_tables: a page must have <!-- tables of tools/layer_tables.py -->"),
    (("layer_tables", LAYERS, "none.md"), "layer_tables: none.md must be readable and writable: No such file"),
    (("scale_tables", "page.md", "--from", "none.json"), "scale_tables: none.json must be readable: No such file"),
    (("scale_tables", "page.md"), "scale_tables: a page must have <!-- tables of tools/scale_tables.py -->"),
    (("loop_instructions", SPEC, "odd", "fast"), "loop_instructions: a schedule must begin with its family"),
    (("loop_instructions", SPEC, "odd", "--target", "sm_1"), "loop_instructions: --target must be among sm_80"),
    (("loop_instructions", SPEC, "odd", "--target", "gfx942"), "--target must be of NVIDIA"),
    (("compare_samplers", "none.log"), "compare_samplers: none.log must be readable: No such file"),
    (("compare_samplers", "none.gz"), "compare_samplers: none.gz must be readable: No such file"),
    (("compare_samplers", "page.md"), "compare_samplers: page.md must be a journal of searches, got JSONDecodeError"),
    (("compare_samplers", "--seeds", "0", SEARCH), "--seeds must be at least 1, got 0"),
    (("cold_start", "none"), "none must be the folder of a package, got none"),
]


@pytest.mark.parametrize(("command", "said"), REFUSED)
def test_what_a_tool_cannot_read_is_one_line(
    command: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    """Nothing is written, and nothing made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text("# A page\n\nText.\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", list(command))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / f"{command[0]}.py"), run_name="__main__")
    assert said in f"{ended.value.code}\n{capsys.readouterr().err}"
    assert ended.value.code != 0
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == "# A page\n\nText.\n"
