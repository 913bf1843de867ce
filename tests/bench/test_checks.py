"""What is checked before it is timed: the very kernels that are timed, and peers as they are called."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support import make_schedule, make_variant

from m2gen import pipeline
from m2gen.bench import check
from m2gen.bench.entries import BenchWorkload, Entry, Implementation
from m2gen.bench.kinds import Kind
from m2gen.bucket import BUCKETS
from m2gen.db import Reason
from m2gen.kernels.compile import load_module
from m2gen.pipeline.packages import Packages

PEER = '''
from m2gen.bench.operators import _reference

def honest(variant):
    eager = _reference(variant)
    return lambda q, k, v, w, f, initial_state, cu_seqlens, clip: eager(
        q, k, v, w, f, initial_state, cu_seqlens, clip=clip
    )

def deaf(variant):
    """Runs its state on from one packed sequence to the next."""
    eager = _reference(variant)

    def call(q, k, v, w, f, initial_state, cu_seqlens, clip):
        if cu_seqlens is None:
            return eager(q, k, v, w, f, initial_state, None, clip=clip)
        y, state = eager(*(x[None] for x in (q, k, v)), w, f[None], None, None, clip=clip)
        return y[0], state.expand(len(cu_seqlens) - 1, *state.shape[1:])

    return call
'''


def kernels_of(folder: Path, arch: str) -> dict[str, tuple[str, ...]]:
    """Return the names of the modules that serve each variant of a package."""
    package = load_module(folder / "__init__.py", f"checked_{folder.name}")
    table: dict[str, tuple[str, ...]] = importlib.import_module(f"{package.__name__}.built").KERNELS[arch]
    return table


def test_any_number_of_sequences_gets_the_kernels_that_are_timed() -> None:
    """A package chooses kernels by the number of sequences, of which checks have few: theirs has one schedule."""
    planned = pipeline.plan("h200.yaml", ["sm_90"])
    packages, several = Packages(planned), 0
    for built in planned.variants:
        schedules = {choice.schedule for choice in planned.serving(built.variant, "sm_90")}
        several += len(schedules) > 1
        names = set()
        for bucket in BUCKETS:
            choice, folder = packages.serving(built.variant, "sm_90", bucket)
            (name,) = set(kernels_of(folder, "sm_90")[built.variant.key])
            assert choice.schedule in schedules
            names.add(name)
        assert len(names) == len(schedules)
    assert several


@pytest.mark.parametrize(("name", "wrong"), [("honest", False), ("deaf", True)])
def test_peers_are_asked_packed_sequences(
    name: str, wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are timed on such; one that goes on from a sequence's state to the next must not be timed."""
    (tmp_path / "packed_peer.py").write_text(PEER, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(check, "STEPS", 6)
    peer = Implementation(Kind.PEER, make_schedule("atomic"), source=f"packed_peer:{name}", label=name)
    variant: Any = make_variant()
    for packed in (False, True):
        entry = Entry(BenchWorkload("x", variant, 4, 20, packed=packed), peer)
        failure = check.failure_of(entry, torch.device("cpu"))
        assert (failure is not None) is (packed and wrong)
        if failure is not None:
            assert failure.reason is Reason.WRONG
            assert "of packed must be within" in failure.message
