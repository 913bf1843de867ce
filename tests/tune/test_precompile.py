"""Candidates compile without a GPU for the calls that will be made of them, and what cannot launch is found out."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path

import pytest
from assembler import CRASHES, NEVER_ENDS, Assembler
from support import make_schedule, make_variant

from m2gen.db import Failure, Reason
from m2gen.device import TARGETS
from m2gen.measure.workers import run_isolated
from m2gen.schedule import Scratch, Tanh, parse
from m2gen.spec import Objective
from m2gen.tune import precompile as module
from m2gen.tune.precompile import PRECOMPILE, SECONDS
from m2gen.tune.space import Subject
from m2gen.tune.trial import Compiled, CompileTask

VARIANT = make_variant(dtype="bf16", tanh="approx")
DEVICE = TARGETS["sm_90"]
SUBJECT = Subject(VARIANT, DEVICE, Objective.TRAIN, 2, 64)
BASE = parse("portable_f16x1u4a_b16x1c2a_i16_ptx")
"""The compiler chooses its layouts, so that it takes shared memory, and compiles for every vendor but for its tanh."""


def compiled(*tasks: CompileTask) -> list[Compiled]:
    """Compile in one process of its own, which is no interpreter, however long that takes."""
    found = dict(run_isolated([list(tasks)], replace(PRECOMPILE, now=lambda: 0.0), 1))
    return [found[task] for task in tasks]


def test_resources_binaries_and_limits() -> None:
    """Registers and shared memory are real; another schedule is another binary; a device without room refuses."""
    small = replace(DEVICE, shared_bytes=64)
    tight = replace(SUBJECT, device=small)
    other = replace(BASE, backward=replace(BASE.backward, chunk=1))
    one, again, second, refused = compiled(
        CompileTask(SUBJECT, BASE),
        CompileTask(replace(SUBJECT, seq=128), BASE),
        CompileTask(SUBJECT, other),
        CompileTask(tight, BASE),
    )
    assert one.failure is None, one.details
    assert 32 < one.registers <= 255
    assert 0 < one.shared_bytes <= DEVICE.shared_bytes
    assert one.binary == again.binary != second.binary
    assert refused.failure is not None
    assert refused.failure.reason is Reason.LAUNCH
    assert "shared memory must be at most 64 bytes, got" in refused.failure.message


def test_mma_of_one_warp_fits_where_there_is_no_shared_memory() -> None:
    """Threads have all that their products and sums need; the default adds its scratch; none is the compiler's code."""
    usual = parse("mma_f16x1u8a_b16x1c2as_i16_ptx")
    buffered = replace(usual, backward=replace(usual.backward, scratch=Scratch.L2))
    none = replace(SUBJECT, device=replace(DEVICE, shared_bytes=0))
    tasks = (CompileTask(none, buffered), CompileTask(SUBJECT, usual), CompileTask(SUBJECT, BASE))
    found, scratch, other = compiled(*tasks)
    for compiles in (found, scratch):
        assert compiles.failure is None, compiles.details
        assert 32 < compiles.registers <= 255
    assert (found.shared_bytes, scratch.shared_bytes) == (0, usual.scratch_bytes(VARIANT))
    assert len({found.binary, scratch.binary, other.binary}) == 3


def test_a_compiler_that_dies_costs_its_candidate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An assembler takes its process down; a candidate for another vendor, which has none, compiles after it."""
    Assembler(tmp_path / "assembler", CRASHES).replace(monkeypatch)
    amd = replace(SUBJECT, device=TARGETS["gfx942"])
    found, fine = compiled(CompileTask(SUBJECT, BASE), CompileTask(amd, replace(BASE, tanh=Tanh.EXP)))
    assert found.failure == Failure(Reason.LAUNCH, "its process ended with SIGSEGV while compiling")
    assert fine.failure is None, fine.details


def _never(task: CompileTask) -> Compiled:
    while True:
        time.sleep(1e6)


def test_a_compiler_that_never_ends_costs_its_candidate() -> None:
    """It is stopped when its time is over, which is the candidate's failure; the next candidate has its turn."""
    hours = itertools.count(0.0, 3600.0)
    service = replace(PRECOMPILE, serve=_never, now=lambda: next(hours))
    tasks = [CompileTask(SUBJECT, BASE), CompileTask(replace(SUBJECT, seq=112), BASE)]
    found = dict(run_isolated([tasks], service, 1))
    assert list(found) == tasks
    for compiles in found.values():
        assert compiles.failure == Failure(Reason.LAUNCH, f"compiling took longer than {SECONDS:g} s")


def test_an_assembler_that_never_ends_costs_its_candidate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton waits for it for ever; it ends with the candidate's time."""
    assembler = Assembler(tmp_path / "assembler", NEVER_ENDS)
    assembler.replace(monkeypatch)
    task = CompileTask(SUBJECT, BASE)
    service = replace(PRECOMPILE, seconds=0.5, now=assembler.calls)
    ((_, found),) = run_isolated([[task]], service, 1)
    assert found.failure == Failure(Reason.LAUNCH, "compiling took longer than 0.5 s")
    assert assembler.calls() == 1
    assembler.wait()


def test_whatever_a_compiler_raises_is_the_candidates_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last line is the message, its traceback the details; it is not kept, since another day may differ."""

    def refuse(task: CompileTask) -> Compiled:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(module, "_compile", refuse)
    found = module.precompile(CompileTask(replace(SUBJECT, seq=112), BASE))
    assert found.failure is not None
    assert (found.failure.reason, found.failure.message) == (Reason.LAUNCH, "second line")
    assert "Traceback" in found.details


def test_the_message_is_that_of_the_error_below_the_carets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's error in a function that kernels call shows each call with a caret under it, and why in its cause."""

    def refuse(task: CompileTask) -> Compiled:
        try:
            raise ValueError("rows must be a power of two")
        except ValueError as error:
            raise RuntimeError("at 1:4:\ny = sums(x)\n    ^") from error

    monkeypatch.setattr(module, "_compile", refuse)
    found = module.precompile(CompileTask(replace(SUBJECT, seq=80), BASE))
    assert found.failure is not None
    assert found.failure.message == "ValueError: rows must be a power of two"
    assert "y = sums(x)" in found.details


def test_what_was_compiled_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text for the same toolchain and sizes is looked up."""
    calls = []

    def once(task: CompileTask) -> Compiled:
        calls.append(task)
        return Compiled(100, 0, 1024, "binary", seconds=1.0)

    monkeypatch.setattr(module, "_compile", once)
    task = CompileTask(replace(SUBJECT, seq=96), make_schedule("partial"))
    assert module.precompile(task) == module.precompile(task)
    assert len(calls) == 1
    module.precompile(replace(task, subject=replace(SUBJECT, batch=3)))
    assert len(calls) == 2
