"""Compiled kernels of a build: the package's own warm-up, run apart from Triton's cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import SCHEDULES, build_package, make_variant

import m2gen.pipeline  # noqa: F401  (fills sys.modules)
from m2gen.errors import CompileError
from m2gen.pipeline.compiled import compiled_files

PACKAGE = build_package("apart", [make_variant()], SCHEDULES["two_level_partial"])


class Silent:
    """Shows no progress."""

    def start(self, stage: str, total: int) -> None: ...
    def advance(self, item: str) -> None: ...
    def finish(self) -> None: ...


def replaced(monkeypatch: pytest.MonkeyPatch, status: int) -> list[tuple[list[str], Path, str]]:
    """Replace the processes of warm-ups by what each would print; return what was asked of them."""
    asked: list[tuple[list[str], Path, str]] = []

    def run(command: list[str], cwd: Path, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append((command[1:], cwd, env["TRITON_CACHE_DIR"]))
        output = f'{{"compiled/{command[5]}.json": "text"}}'
        return subprocess.CompletedProcess(command, status, output, "apart: no such kernel\n")

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_each_arch_is_a_warm_up(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    """The package's own command runs in a folder with the package, with a cache that is not Triton's usual one."""
    asked = replaced(monkeypatch, 0)
    found = compiled_files(PACKAGE, ["sm_80", "sm_90"], Silent())
    assert found == {"compiled/sm_80.json": "text", "compiled/sm_90.json": "text"}
    for (command, folder, cache), arch in zip(asked, ("sm_80", "sm_90"), strict=True):
        assert command == ["-m", "apart", "warm-up", "--device", arch, "--entries"]
        assert (folder / "apart" / "__main__.py").read_text(encoding="utf-8") == PACKAGE.files["__main__.py"]
        assert cache.startswith(str(cache_dir))


def test_a_kernel_that_does_not_compile_fails_the_build(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    """The error has what the warm-up says."""
    replaced(monkeypatch, 1)
    with pytest.raises(CompileError, match="for sm_80 must compile, got apart: no such kernel"):
        compiled_files(PACKAGE, ["sm_80"], Silent())


def test_the_command_is_one_that_the_package_has(tmp_path: Path) -> None:
    """A package has the options that builds use."""
    for path, text in PACKAGE.files.items():
        (tmp_path / "apart" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "apart" / path).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "apart", "warm-up", "--device", "none", "--entries"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "apart: warm_up: device must be a GPU, or an arch such as sm_90, got 'none'\n"
