"""The tool that runs the suite on other versions of Triton: an environment for each, and a status for each command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from m2gen.kernels.compile import load_module

tool = load_module(ROOT / "tools" / "tritons.py", "m2gen_test_tritons")
PROGRAM = "import json, sys, triton, jinja2; print(json.dumps([triton.__version__, jinja2.__file__, sys.executable]))"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have pip write an empty package in place of what it is asked for; return the requirements."""
    asked: list[str] = []
    run = subprocess.run

    def pip(command: list[str], **options: Any) -> Any:
        if command[1:4] != ["-m", "pip", "install"]:
            return run(command, **options)
        asked.append(command[-1])
        name, _, version = command[-1].partition("==")
        folder = Path(command[command.index("--target") + 1]) / name
        folder.mkdir()
        (folder / "__init__.py").write_text(f"__version__ = {version!r}\n", encoding="utf-8")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    return asked


def test_an_environment_differs_in_its_triton_alone(installed: list[str], tmp_path: Path) -> None:
    """Its Python finds that one before this Python's, and all else here; it is filled once."""
    for _ in range(2):
        python = tool.environment("3.7.0", tmp_path)
    assert installed == ["triton==3.7.0"]
    version, other, executable = json.loads(subprocess.check_output([str(python), "-c", PROGRAM], cwd=tmp_path))
    assert (version, executable) == ("3.7.0", str(python))
    assert Path(other).is_relative_to(Path(sys.prefix).resolve()) or Path(other).is_relative_to(sys.prefix)


def test_every_version_has_its_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One failure is the exit status, and ends nothing; what pytest is given replaces the rooms."""
    monkeypatch.setattr(tool, "environment", lambda version, folder: folder / version / "bin" / "python")
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        return subprocess.CompletedProcess(command, int("3.8.0" in command[0] and "verify" in command))

    monkeypatch.setattr(subprocess, "run", run)
    assert tool.main([]) == 1
    assert len(seen) == 4 * len(tool.NEEDS)
    assert [place for place in tool.SUITE if not (ROOT / place).is_dir()] == []
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "status 1" in line][-1].startswith("triton 3.8.0: status 1: m2gen verify")
    assert tool.main(["3.9.0", "--", "tests/kernels", "-x"]) == 0
    assert seen[-1][2:] == ["pytest", "-q", "tests/kernels", "-x"]


def test_a_version_that_is_not_there_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where pip finds none, the other versions have their turn, and the exit status is 1."""
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool.venv, "create", lambda base, clear: None)

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "triton==9.9.9" in command:
            raise subprocess.CalledProcessError(1, command)
        if "pip" in command:
            Path(command[command.index("--target") + 1]).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert tool.main(["9.9.9", "3.9.0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    lines = lines[lines.index("") + 1 :]
    assert lines[0] == "triton 9.9.9: status 1: pip install triton==9.9.9"
    assert [line.split(": ")[:2] for line in lines[1:]] == 4 * [["triton 3.9.0", "status 0"]]


def test_the_versions_are_those_that_are_supported() -> None:
    """The least and the newest that pyproject.toml takes are among them, and so is the pinned one."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    least, beyond = re.search(r'"triton>=(\d+\.\d+),<(\d+\.\d+)"', project).groups()  # type: ignore[union-attr]
    series = [version.rpartition(".")[0] for version in tool.NEEDS]
    assert (series[0], f"3.{int(series[-1].rpartition('.')[2]) + 1}") == (least, beyond)
    pinned = re.search(r"^triton==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    assert pinned[1] in tool.NEEDS
