"""The tuner on a real GPU: what was compiled without one is what runs, and a short search ends in a record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, make_variant

from m2gen.db import Database
from m2gen.device import detect
from m2gen.measure.workers import run_isolated
from m2gen.schedule import default
from m2gen.spec import Objective
from m2gen.tune.gpu import GPU
from m2gen.tune.precompile import PRECOMPILE
from m2gen.tune.space import Subject
from m2gen.tune.trial import CompileTask, Step, Task

pytestmark = pytest.mark.gpu

SPEC = """schema: 1
name: one
targets: sm_90
layers:
  base:
    head_dim: 16
    state_expansion: 32
    heads: {q: 1, k: 1, v: 16, f: 16, w: 16}
    dtypes: bf16
    workloads: [{batch: 4, seq: 512}]
"""


def kernels(cache: Path) -> set[str]:
    """Return the kernels that Triton's cache holds."""
    return {path.parent.name for suffix in ("cubin", "hsaco") for path in cache.rglob(f"m2rnn_*.{suffix}")}


@pytest.mark.parametrize("objective", list(Objective))
def test_the_gpu_worker_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: Objective) -> None:
    """Every kernel of check and clock is in Triton's cache before the GPU worker needs it."""
    device = detect()
    assert device is not None
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("M2GEN_CACHE_DIR", str(tmp_path / "m2gen"))
    variant = make_variant(32, 16, (1, 1, 16, 16, 16), dtype="bf16", tanh="approx")
    subject, schedule = Subject(variant, device, objective, 4, 512), default(variant, device)
    ((_, compiled),) = run_isolated([[CompileTask(subject, schedule)]], PRECOMPILE, 1)
    assert compiled.failure is None, compiled.details
    before = kernels(tmp_path / "triton")
    tasks = [Task(subject, schedule, step) for step in (Step.PREPARE, Step.SCREEN, Step.HELD_OUT, Step.TIME)]
    found = dict(run_isolated([tasks], GPU, 1))
    for task in tasks:
        assert found[task].failure is None, found[task].details
    assert kernels(tmp_path / "triton") == before
    samples = found[tasks[1]].samples
    assert samples is not None
    assert 0 < samples.median_ms < 100
    assert bool(samples.backward_ms) == (objective is Objective.TRAIN)
    assert samples.peak_bytes > 0


def test_a_short_search(tmp_path: Path) -> None:
    """A search as a person types it ends in a record no slower than the default; a second run repeats no trial."""
    (tmp_path / "one.yaml").write_text(SPEC, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "M2GEN_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "m2gen", "tune", "--spec", "one.yaml", "--budget", "120s", "--trials", "8"]
    for _ in range(2):
        done = subprocess.run(
            [*command, "--db", "db", "--report", "out.html", "--json"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (found,) = json.loads(done.stdout)
        assert found["trials"] == 8
        assert found["tuned_ms"][1] <= found["default_ms"][1] * 1.01
    assert [record for record in Database(tmp_path / "db").records() if not record.failure]
    assert (tmp_path / "out.html").stat().st_size > 5000
