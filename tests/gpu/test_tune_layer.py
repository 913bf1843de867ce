"""Tiles of the kernels around a recurrence, searched on a real GPU: compiled ahead, checked, timed, recorded, built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from support import ROOT, make_variant
from test_tune import SPEC, kernels

from m2gen import pipeline
from m2gen.db import Database
from m2gen.device import detect
from m2gen.measure.workers import run_isolated
from m2gen.schedule.layer import DEFAULTS
from m2gen.schedule.layer_knobs import LayerKernel
from m2gen.schedule.tunable import Tunable, kernels_of
from m2gen.spec import Objective
from m2gen.tune.gpu import GPU
from m2gen.tune.precompile import PRECOMPILE
from m2gen.tune.subject import Subject
from m2gen.tune.trial import CompileTask, Measurement, Step, Task

pytestmark = pytest.mark.gpu

STEPS = (Step.PREPARE, Step.SCREEN, Step.HELD_OUT, Step.TIME)


def measured(tasks: Iterable[Task]) -> dict[Task, Measurement]:
    """Return what the GPU worker finds."""
    return dict(run_isolated([list(tasks)], GPU, 1))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", list(LayerKernel))
def test_the_gpu_worker_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: LayerKernel, dtype: str
) -> None:
    """What check and clock launch is in Triton's cache before; the usual tiles are within float64's budgets."""
    device = detect()
    assert device is not None
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("M2GEN_CACHE_DIR", str(tmp_path / "m2gen"))
    variant = Tunable.around(make_variant(64, 16, (1, 1, 20, 20, 20), dtype=dtype, tanh="approx"), kernel).variant
    sizes = (64, 1) if kernel is LayerKernel.DECODE else (4, 512)
    subject, tiles = Subject(variant, device, Objective.TRAIN, *sizes, kernel=kernel), DEFAULTS[kernel]
    ((_, compiled),) = run_isolated([[CompileTask(subject, tiles)]], PRECOMPILE, 1)
    assert compiled.failure is None, compiled.details
    before = kernels(tmp_path / "triton")
    tasks = [Task(subject, tiles, step) for step in STEPS]
    found = measured(tasks)
    for task in tasks:
        assert found[task].failure is None, found[task].details or found[task].failure
    assert kernels(tmp_path / "triton") == before
    samples = found[tasks[1]].samples
    assert samples is not None
    assert 0 < samples.median_ms < 10
    assert bool(samples.backward_ms) == (kernel is LayerKernel.DECAY)


def test_a_short_search_of_every_kernel(tmp_path: Path) -> None:
    """A search as a person types it ends in a record of each kernel, which the next build uses."""
    (tmp_path / "one.yaml").write_text(SPEC, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "M2GEN_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "m2gen", "tune", "--spec", "one.yaml", "--kernels", "layer", "--trials", "6"]
    done = subprocess.run(
        [*command, "--budget", "400s", "--db", "db", "--report", "out.html", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    planned = pipeline.plan(str(tmp_path / "one.yaml"), records=())
    (variant,) = (built.variant for built in planned.variants)
    expected = kernels_of(Objective.TRAIN, variant)
    assert [each["variant"] for each in found] == [Tunable.around(variant, kernel).key for kernel in expected]
    for each in found:
        assert each["trials"] == 6
        assert not each["failures"], each
        assert each["tuned_ms"][1] <= each["default_ms"][1] * 1.01
    records = Database(tmp_path / "db").records()
    assert len([record for record in records if not record.failure]) == len(expected)
    device = detect()
    assert device is not None
    tuned = pipeline.plan(str(tmp_path / "one.yaml"), [device.arch], records)
    winners = {record.schedule for record in records if not record.failure}
    (choice, *_) = tuned.serving(variant, device.arch)
    assert set(choice.tiles) == winners
