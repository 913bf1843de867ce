"""Candidates for kernels around a recurrence against float64: every tile passes, and what is wrong is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import make_variant

from m2gen.db import Failure, Reason
from m2gen.device import PORTABLE, TARGETS
from m2gen.kernels.compile import load_kernels
from m2gen.measure.checks import Verdict
from m2gen.measure.workers import run_isolated
from m2gen.schedule.layer import (
    DEFAULTS,
    AnyTiles,
    ConvolveBackwardTiles,
    ConvolveTiles,
    DecayTiles,
    DecodeTiles,
    FinishBackwardTiles,
    FinishTiles,
)
from m2gen.schedule.layer_knobs import LayerKernel
from m2gen.schedule.tunable import Tunable
from m2gen.spec import Objective
from m2gen.tune.layer import operands, worker
from m2gen.tune.layer.calls import source_of
from m2gen.tune.precompile import PRECOMPILE
from m2gen.tune.subject import Subject
from m2gen.tune.trial import CompileTask, Step

SMALL = make_variant(9, 9, (1, 2, 4, 2, 4), "bf16", tanh="approx")
OTHERS: dict[LayerKernel, AnyTiles] = {
    tiles.family: tiles
    for tiles in (
        ConvolveTiles(4, 64, 1),
        ConvolveBackwardTiles(8, 32, 1, 1),
        DecayTiles(8, 1),
        FinishTiles(16, 128, 1),
        FinishBackwardTiles(8, 128, 2),
        DecodeTiles(3, 16, 128),
    )
}
"""Tiles of other sizes than the usual, which cut steps, channels and heads elsewhere."""
MUTATIONS = {
    LayerKernel.CONVOLVE: ("total *= sigmoid(total)", "total *= sigmoid(total + 0.05)"),
    LayerKernel.CONVOLVE_BACKWARD: ("dw_0 += d_0 * tap_0", "dw_0 += d_0 * tap_0 * (s > first + 3)"),
    LayerKernel.DECAY: ("tl.where(mask, dx_t, 0.0)", "tl.where(mask & (t > 0)[:, None], dx_t, 0.0)"),
    LayerKernel.FINISH: ("scale = tl.rsqrt(total / INNER + eps)", "scale = tl.rsqrt(total / (INNER - 1) + eps)"),
    LayerKernel.FINISH_BACKWARD: ("dnorm_0 += d_0 * r_0 * scale", "dnorm_0 += d_0 * r_0 * scale * (t > 0)"),
    LayerKernel.DECODE: ("y += tl.sum(q[:, None] * h, 0)", "y += tl.sum(q[:, None] * h, 0) * 0.97"),
}
"""Small faults: an activation, a step or a token that is left out, a mean of too few, a sum that is too small."""


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check on short sequences, for the interpreter's sake."""
    monkeypatch.setattr(operands, "STEPS", 20)
    worker._answered.cache_clear()


def subject_of(kernel: LayerKernel, dtype: str = "bf16") -> Subject:
    """Return the subject of a search on a device whose kernels the interpreter runs."""
    variant = Tunable.around(replace(SMALL, dtype=type(SMALL.dtype)(dtype)), kernel).variant
    return Subject(variant, PORTABLE, Objective.TRAIN, 2, 20, kernel=kernel)


def checked(tiles: AnyTiles, step: Step = Step.SCREEN, dtype: str = "bf16") -> Verdict:
    """Return the verdict on a candidate."""
    subject = subject_of(tiles.family, dtype)
    return worker.check_tiles(subject, tiles, worker.asked_of(subject, step), torch.device("cpu"))


@pytest.mark.parametrize("kernel", list(LayerKernel))
def test_usual_and_other_tiles_pass(kernel: LayerKernel) -> None:
    """Results and gradients are within their budgets, and say how far: on usual calls, and on held-out ones."""
    for tiles, step in ((DEFAULTS[kernel], Step.HELD_OUT), (OTHERS[kernel], Step.SCREEN)):
        verdict = checked(tiles, step)
        assert verdict.failure is None
        assert verdict.errors
        assert all(0 <= found.error <= found.budget for found in verdict.errors)


@pytest.mark.parametrize("kernel", [LayerKernel.CONVOLVE_BACKWARD, LayerKernel.FINISH_BACKWARD, LayerKernel.DECODE])
def test_float32_is_held_to_its_own_budgets(kernel: LayerKernel) -> None:
    """Budgets are of the dtype: a few roundings of float32."""
    verdict = checked(OTHERS[kernel], dtype="fp32")
    assert verdict.failure is None
    assert max(found.budget for found in verdict.errors) < 1e-4


@pytest.mark.parametrize("kernel", list(LayerKernel))
def test_a_small_fault_is_found(kernel: LayerKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is nearly right is wrong, and never timed."""
    right, wrong = MUTATIONS[kernel]
    source = source_of(subject_of(kernel).variant, DEFAULTS[kernel])
    assert right in source
    monkeypatch.setattr(worker, "load", lambda variant, tiles: load_kernels(source.replace(right, wrong)))
    failure = checked(DEFAULTS[kernel]).failure
    assert failure is not None
    assert failure.reason is Reason.WRONG


def test_what_is_not_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is filled with NaN before a call."""
    tiles = DEFAULTS[LayerKernel.FINISH]
    source = source_of(subject_of(tiles.family).variant, tiles)
    skips = source.replace("for t in range(first, ", "for t in range(first + (first == 1), ")
    assert skips != source
    monkeypatch.setattr(worker, "load", lambda variant, tiles: load_kernels(skips))
    verdict = checked(tiles)
    assert verdict.failure is not None
    assert "o of plain must be within" in verdict.failure.message


def test_candidates_compile_for_their_calls_without_a_gpu() -> None:
    """Registers are real, a knob is another binary, and one that changes nothing is the same."""
    device = TARGETS["sm_90"]
    subject = replace(subject_of(LayerKernel.FINISH), device=device)
    wide, two = FinishTiles(block=2048), FinishTiles(rows=2)
    tasks = [CompileTask(subject, tiles) for tiles in (FinishTiles(), wide, two)]
    found = dict(run_isolated([tasks], replace(PRECOMPILE, now=lambda: 0.0), 1))
    one, same, other = (found[task] for task in tasks)
    assert one.failure is None, one.details
    assert 8 < one.registers <= device.registers
    assert one.binary == same.binary != other.binary
    broken = CompileTask(replace(subject, device=replace(device, registers=1)), FinishTiles())
    ((_, refused),) = run_isolated([[broken]], replace(PRECOMPILE, now=lambda: 0.0), 1)
    assert isinstance(refused.failure, Failure)
    assert refused.failure.reason is Reason.LAUNCH
