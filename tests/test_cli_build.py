"""``m2gen build``: what it writes, what it leaves alone, and what ``--check`` finds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command_line import document, fails, outcome, row, run

import m2gen.pipeline  # noqa: F401  (fills sys.modules)

STAGE = sys.modules["m2gen.pipeline.build"]
"""The module, whose name in the package is that of its function."""


@pytest.fixture
def built(spec: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a package that the command line built, its kernels compiled for no target."""
    monkeypatch.setattr(STAGE, "check", lambda planned, progress: [])
    result = run("build", "--spec", "one.yaml", "--no-verify", "--quiet")
    assert result.exit_code == 0, result.output
    return spec.parent / "generated" / "one"


def test_build_check(built: Path) -> None:
    """A package is current until it is edited or gets a file of somebody else, and checking changes nothing."""
    assert run("build", "--spec", "one.yaml", "--check").exit_code == 0
    (built / "op.py").write_text("edited\n", encoding="utf-8")
    (built / "stray.py").write_text("stray\n", encoding="utf-8")
    result = run("build", "--spec", "one.yaml", "--check")
    assert result.exit_code == 1
    assert {"-edited", "-stray"} <= set(result.stdout.splitlines())
    assert result.stderr.splitlines() == ["m2gen: one is stale; run `m2gen build --spec one.yaml`"]
    assert document("build", "--spec", "one.yaml", "--check", status=1)["current"] is False
    assert (built / "op.py").read_text(encoding="utf-8") == "edited\n"


def test_build_check_without_a_package(spec: Path) -> None:
    """A package that is not there is stale, and stays away."""
    assert run("build", "--spec", "one.yaml", "--check").exit_code == 1
    assert not (spec.parent / "generated").exists()


def test_build_refuses_a_folder_of_something_else(built: Path) -> None:
    """Without its manifest a folder is somebody's own."""
    (built / "MANIFEST.json").unlink()
    line = fails(1, "build", "--spec", "one.yaml", "--no-verify", "--quiet")
    assert "must be absent, empty or a generated package" in line


def test_a_build_that_fails_verification_leaves_the_old_package(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels over budget are not written over those that are not."""
    before = (built / "MANIFEST.json").read_bytes()
    monkeypatch.setattr(STAGE, "verify", lambda *_: outcome(2e-3))
    assert "t0 must be within 1.00e-03, got 2.00e-03; reproduce: m2gen" in fails(
        1, "build", "--spec", "one.yaml", "--quiet"
    )
    assert (built / "MANIFEST.json").read_bytes() == before


def test_a_kernel_that_cannot_launch_fails_the_build(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build stops before anything is written."""
    monkeypatch.setattr(STAGE, "check", lambda planned, progress: [row("too many registers")])
    assert "too many registers" in fails(1, "build", "--spec", "one.yaml", "--quiet")
    assert not (spec.parent / "generated").exists()


def test_check_without_a_spec_takes_every_package(built: Path) -> None:
    """``build --check`` alone compares each package in OUT with the spec that its manifest names."""
    assert run("build", "--check").exit_code == 0
    (built / "op.py").write_text("edited\n", encoding="utf-8")
    assert run("build", "--check").exit_code == 1
    (built / "MANIFEST.json").write_text("{}", encoding="utf-8")
    assert "MANIFEST.json" in fails(2, "build", "--check")
    assert "at least one" in fails(2, "build", "--check", "--out", "elsewhere")
