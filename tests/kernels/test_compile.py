"""Kernels are compiled in worker processes: one that never ends or crashes costs its kernel, never the run."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from assembler import NEVER_ENDS, Assembler
from command_line import run
from support import make_variant

from m2gen.device import TARGETS
from m2gen.errors import CacheError, CompileError
from m2gen.kernels.compile import Job
from m2gen.kernels.lowering import Direction, Lowering
from m2gen.kernels.resources import Resources, resources_of
from m2gen.measure.workers import Service
from m2gen.pipeline.check import COMPILE, SECONDS, compile_all
from m2gen.schedule import default

DEVICE = TARGETS["sm_90"]
FOUND = Resources(registers=64, spill_bytes=0, shared_bytes=0, code_bytes=1024)


def _never(job: Job) -> Resources:
    while True:
        time.sleep(1e6)


def _crash_at_backward(job: Job) -> Resources:
    if job.direction is Direction.BACKWARD:
        os.kill(os.getpid(), signal.SIGABRT)
    return FOUND


def _crash_at_backward_else_never(job: Job) -> Resources:
    return _crash_at_backward(job) if job.direction is Direction.BACKWARD else _never(job)


def hanging() -> Service:
    """Return a compiler that never ends, by a clock that goes on by an hour at every look."""
    hours = itertools.count(0.0, 3600.0)
    return replace(COMPILE, serve=_never, now=lambda: next(hours))


def replace_compiler(monkeypatch: pytest.MonkeyPatch, service: Service) -> None:
    monkeypatch.setattr(sys.modules["m2gen.pipeline.check"], "COMPILE", service)


@pytest.fixture
def jobs(cache_dir: Path) -> list[Job]:
    """Return the kernels of one variant, of which nothing is known yet."""
    variant = make_variant()
    return [Job(Lowering(variant, default(variant, DEVICE)), direction, DEVICE) for direction in Direction]


def test_a_compiler_that_never_ends_is_each_kernels_error(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the kernel and the limit, and is not kept: another compiler may end."""
    replace_compiler(monkeypatch, hanging())
    seen: list[Job] = []
    found = compile_all(jobs, 2, seen.append)
    assert sorted(seen, key=jobs.index) == jobs
    for job in jobs:
        assert isinstance(found[job], CompileError)
        assert str(found[job]) == f"{job.name}: compiling took longer than {SECONDS:g} s"
    replace_compiler(monkeypatch, replace(COMPILE, serve=_crash_at_backward, now=lambda: 0.0))
    assert compile_all(jobs, 1)[jobs[0]] == FOUND


def test_an_assembler_that_never_ends_is_ended(
    jobs: list[Job], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Triton waits for the program that it calls for ever; that does not outlive its kernel's time."""
    assembler = Assembler(tmp_path / "assembler", NEVER_ENDS)
    assembler.replace(monkeypatch)
    replace_compiler(monkeypatch, replace(COMPILE, seconds=0.5, now=assembler.calls))
    found = compile_all(jobs[:1], 1)
    assert str(found[jobs[0]]) == f"{jobs[0].name}: compiling took longer than 0.5 s"
    assert assembler.calls() == 1
    assembler.wait()


def test_a_compiler_that_takes_its_process_down(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel has the error, the others are compiled, and those are not compiled again."""
    replace_compiler(monkeypatch, replace(COMPILE, serve=_crash_at_backward, now=lambda: 0.0))
    forward, backward, step = jobs
    for _ in range(2):
        found = compile_all(jobs, 1)
        assert found[forward] == found[step] == FOUND
        assert str(found[backward]) == f"{backward.name}: its process ended with SIGABRT while compiling"
        replace_compiler(monkeypatch, replace(COMPILE, serve=_crash_at_backward_else_never, now=lambda: 0.0))


@pytest.mark.parametrize("command", ["check", "build"])
def test_commands_name_the_kernel(command: str, spec: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``check`` and ``build`` fail with a line for each kernel, and no package is written."""
    replace_compiler(monkeypatch, hanging())
    result = run(command, "--spec", str(spec), "--no-db")
    assert result.exit_code == 1, result.output
    for direction in Direction:
        assert f"{direction} for sm_90: compiling took longer than {SECONDS:g} s" in " ".join(result.output.split())
    assert not list(spec.parent.glob("generated/*"))


def test_temporary_files_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full says nothing of the kernel: it is named, with the variable that leads elsewhere."""

    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("m2gen.kernels.resources.NamedTemporaryFile", full)
    said = r"temporary files must be writable: No space left on device; TMPDIR may name a folder"
    with pytest.raises(CacheError, match=said):
        resources_of(SimpleNamespace(asm={"cubin": b""}), TARGETS["sm_90"])
