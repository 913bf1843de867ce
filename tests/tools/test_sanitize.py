"""The script behind ``make sanitize``: its calls run, and it believes a tool only when that says it found nothing."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import sanitize
import torch
from calls import Spy

from m2gen.device import PORTABLE, TARGETS
from m2gen.kernels.launch import SHORT
from m2gen.problem import Problem
from m2gen.schedule import Family, problems
from m2gen.spec import ClipMode, Fp32Products


@pytest.mark.parametrize("name", ["masked", "softplus", "total", "tf32"])
def test_the_calls_run(tmp_path: Path, device: torch.device, monkeypatch, name: str) -> None:
    """Every call of an entry runs, here on shorter sequences, and gives finite results."""
    short = {"padded": Problem(1, 1, initial_state=True), "packed": Problem(0, 0, lengths=(0, 1), initial_state=True)}
    monkeypatch.setattr(sanitize, "PROBLEMS", short)
    whole = {"dense": Problem(1, 2), "packed": Problem(0, 0, lengths=(0, 1))}
    monkeypatch.setattr(sanitize, "LAYER_PROBLEMS", whole)
    labels = []
    for label, call in sanitize.calls(name, tmp_path, device):
        results = call()
        tensors = results.values() if isinstance(results, dict) else results
        assert all(x.isfinite().all() for x in tensors)
        labels.append(label)
    kinds = ("deterministic", "default", "without gradients")
    expected = [f"{name} {problem} {kind}" for problem in short for kind in kinds]
    expected += [f"{name} step on {dtype}" for dtype in (torch.float32, torch.bfloat16)]
    expected += [f"{name} pool of {dtype}" for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    pools = [f"on a pool of {dtype}" for dtype in (torch.float32, torch.bfloat16)]
    layers = [f"{name} layer {width} {kind}" for width in (4, None) for kind in (*whole, *pools)]
    assert labels == expected + [*layers, f"{name} rows scaled"] * (name in sanitize.LAYERED)


def test_the_script_starts_as_one_types_it(tmp_path: Path) -> None:
    """It finds what it imports without pytest's paths."""
    command = [sys.executable, sanitize.__file__, "--calls", "nothing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "")
    assert "entries of the matrix" in done.stdout


def test_calls_without_gradients_save_nothing(tmp_path: Path, device: torch.device, monkeypatch) -> None:
    """They run the forward alone, without checkpoints, which is another kernel than that of training."""
    monkeypatch.setattr(sanitize, "PROBLEMS", {"padded": Problem(1, 1)})
    found = dict(sanitize.calls("masked", tmp_path, device))
    spy = Spy(sys.modules["m2gen_test_masked"], monkeypatch)
    found["masked padded without gradients"]()
    assert spy.launched == ["forward"]
    ((_, _, checkpoints),) = spy.results["forward"]
    assert checkpoints is None


def test_the_matrix_covers_what_it_should() -> None:
    """Masked rows and columns, rows over two programs, several warps, every gate, clip and product, empty sequences."""
    variants = [variant for variant, _ in sanitize.MATRIX.values()]
    assert any(v.masks_rows for v in variants)
    assert any(v.masks_cols for v in variants)
    assert any(v.computes_gate for v in variants)
    assert any(s.backward.parts(v) > 1 for v, s in sanitize.MATRIX.values())
    assert any(s.backward.warps > 1 for _, s in sanitize.MATRIX.values())
    assert {v.clip for v in variants} == set(ClipMode)
    assert {v.products for v in variants} == set(Fp32Products)
    assert {s.two_level for _, s in sanitize.MATRIX.values()} == {False, True}
    mma = [s.backward for _, s in sanitize.MATRIX.values() if s.family is Family.MMA]
    assert {(1, 4), (1, 2)} <= {(part.warps, part.chunk) for part in mma}
    assert math.prod(sanitize.PROBLEMS["long"].lead) > SHORT
    assert 0 in (sanitize.PROBLEMS["packed"].lengths or ())
    devices = {Family.PORTABLE: PORTABLE, Family.MMA: TARGETS["sm_90"], Family.WGMMA: TARGETS["sm_90"]}
    assert [problems(v, s, devices[s.family]) for v, s in sanitize.MATRIX.values()] == [()] * len(variants)
    assert {s.family for _, s in sanitize.MATRIX.values()} == set(Family)


FAKES = {
    "clean": ("echo '========= ERROR SUMMARY: 0 errors'", ""),
    "found": ("echo '========= ERROR SUMMARY: 3 errors'; exit 1", "exit status 1"),
    "did_not_look": ("echo 'Device not supported'", "exit status 0"),
    "found_but_says_fine": ("echo '========= RACECHECK SUMMARY: 10 hazards displayed'", "exit status 0"),
}


@pytest.mark.parametrize("fake", FAKES)
def test_only_a_tool_that_looked_and_found_nothing_is_believed(tmp_path, monkeypatch, fake) -> None:
    """Neither an exit status of 0 without a summary, nor a summary of something, is clean."""
    script, problem = FAKES[fake]
    path = tmp_path / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert sanitize.check("memcheck", ["true"]).startswith(problem)
    assert bool(sanitize.check("memcheck", ["true"])) == bool(problem)


def test_a_tool_that_hangs_is_stopped(tmp_path, monkeypatch) -> None:
    """The limit holds, and is what is said."""
    path = tmp_path / "compute-sanitizer"
    path.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sanitize, "LIMIT", 0.2)
    assert sanitize.check("racecheck", ["true"]) == "must end within 0.2 s"


def test_without_the_tool(tmp_path, monkeypatch) -> None:
    """A machine without the toolkit is told where the tool comes from."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "CUDA toolkit" in sanitize.check("memcheck", ["true"])


def test_entries_under_a_tool(tmp_path, monkeypatch) -> None:
    """Each entry runs under the tool by itself; what one has found is said with its name."""
    path = tmp_path / "compute-sanitizer"
    path.write_text('#!/bin/sh\nfor last; do :; done\necho "ERROR SUMMARY: $([ $last = mma ]; echo $?) errors"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert sanitize.checked("memcheck", ["mma", "mma"]) == ""
    assert sanitize.checked("memcheck", ["mma", "masked"]).startswith("masked: exit status 0")


def test_tools_and_entries_in_any_order(monkeypatch, capsys) -> None:
    """Those that are named, and of what is not named all."""
    ran = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "entries", lambda: ["masked", "total"])
    monkeypatch.setattr(sanitize, "compiled", lambda names: True)
    monkeypatch.setattr(sanitize, "checked", lambda tool, names: ran.append((tool, *names)) or "")
    for arguments in (["mma", "racecheck"], ["memcheck"], ["mma", "total"]):
        assert sanitize.main(arguments) == 0
    both = [("memcheck", "mma", "total"), ("racecheck", "mma", "total")]
    assert ran == [("racecheck", "mma"), ("memcheck", "masked", "total"), *both]
    monkeypatch.setattr(sanitize, "checked", lambda tool, names: "mma: something")
    assert sanitize.main(["racecheck", "mma"]) == 1
    assert "racecheck: mma: something" in capsys.readouterr().out


def test_unknown_arguments(capsys) -> None:
    """A mistyped tool is not skipped over."""
    assert sanitize.main(["memchek"]) == 2
    assert "got memchek" in capsys.readouterr().out
