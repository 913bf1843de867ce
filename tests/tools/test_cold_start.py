"""The tool that measures cold starts: what it runs is Python, and asks packages for what they have."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from m2gen.kernels.compile import load_module
from m2gen.runtime.__main__ import _parser

tool = load_module(ROOT / "tools" / "cold_start.py", "m2gen_test_cold_start")


def test_a_row_for_each_state_of_the_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Only a row and the one after it share a cache; what the warm-up compiled is in the package of the last one."""
    caches: list[str] = []

    def run(command: list[str], cwd: Path, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        if command[1] == "-c":
            compile(command[2], "child", "exec")
            assert command[4:] == ["some", "layer"]
            caches.append(Path(env["TRITON_CACHE_DIR"]).name)
            return subprocess.CompletedProcess(command, 0, f"{(cwd / 'some' / 'compiled' / 'a.json').exists()}\n")
        options = _parser().parse_args(command[3:])
        assert (options.layers, options.uses, options.lengths) == (["layer"], ["train"], [4096])
        return subprocess.CompletedProcess(command, 0, json.dumps({"compiled/a.json": "{}"}) if options.entries else "")

    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "some" / "compiled").mkdir(parents=True)
    (tmp_path / "some" / "compiled" / "a.json").touch()
    tool.main(str(tmp_path / "some"), "layer")
    assert len(set(caches)) == len(caches) - 1 == 4
    rows = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if not line.startswith(" in ")]
    assert rows == ["False", "False", "False", "False", "True"]
