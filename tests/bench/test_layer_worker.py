"""The worker of benchmarks of layers on a stand-in GPU: each kind is checked, timed and decodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from stand_in import REPLAY_MS, stand_in_gpu
from support import build_package, make_schedule, make_variant

import m2gen.measure.clock
from m2gen.bench.kinds import Call, TimerStep
from m2gen.bench.layers import check, clock, makers, worker
from m2gen.bench.layers.breakdown import KernelTime
from m2gen.bench.layers.entries import LayerEntry, LayerResult, LayerTask, LayerUnderTest, LayerWorkload
from m2gen.bench.layers.kinds import LayerKind
from m2gen.cache import materialise
from m2gen.db import Reason
from m2gen.measure import gpu

VARIANT = make_variant(heads=(1, 1, 2, 2, 2))
GATED = make_variant(heads=(1, 1, 2, 2, 2), gate="softplus")
SCHEDULE = make_schedule("atomic", interval=4)
HIDDEN = 24
SEQUENCE = LayerWorkload("base", VARIANT, HIDDEN, 2, 6)
TOKEN = replace(SEQUENCE, batch=3, seq=5, call=Call.DECODE)
CALLS = pytest.mark.parametrize("workload", [SEQUENCE, TOKEN], ids=lambda w: str(w.call))
KERNELS = (KernelTime("m2rnn_forward_kernel", 1.0, 1.0),)

ADAPTERS = '''
import torch
from torch import nn

from m2gen.bench.layers.subject import LayerSubject, same_in


def right(variant):
    from m2gen.runtime.reference import m2rnn
    assert not variant.computes_gate
    return lambda *operands, clip: m2rnn(*operands, clip=clip)


def wrong(variant):
    operator = right(variant)
    return lambda *operands, clip: [1.01 * part for part in operator(*operands, clip=clip)]


def nothing(asked):
    return None


def square(shape):
    layer = nn.Linear(shape.hidden, shape.hidden, device=shape.device, dtype=shape.dtype)
    return LayerSubject(layer, layer, same_in(layer), packages=("jinja2", "none-such"))


def unknown(shape):
    layer = nn.Linear(shape.hidden, shape.hidden, device=shape.device, dtype=shape.dtype)
    return LayerSubject(layer, layer, None)


def scaled(shape):
    """Has the right output, and a gradient of its bias that is not."""
    layer = nn.Linear(shape.hidden, shape.hidden, device=shape.device, dtype=shape.dtype)
    def call(x):
        return layer(x) + 0.5 * (layer.bias - layer.bias.detach())
    return LayerSubject(layer, call, same_in(layer))


def guarded(shape):
    if not shape.timing_only:
        raise RuntimeError("other: needs a newer Triton")
    layer = nn.Linear(shape.hidden, shape.hidden, device=shape.device, dtype=shape.dtype)
    return LayerSubject(layer, layer, same_in(layer), guard="needs a newer Triton")
'''


@pytest.fixture(scope="module")
def folder() -> Path:
    """Return the folder of a package of two variants."""
    package = build_package("timed_layers", [VARIANT, GATED], SCHEDULE)
    return materialise("packages/timed_layers", package.files)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    stand_in_gpu(monkeypatch)
    monkeypatch.setattr(gpu, "TORCH_DEVICE", "cpu")
    monkeypatch.setattr(check, "STEPS", 6)
    monkeypatch.setattr(check, "DRAWS", 2)
    monkeypatch.setattr(clock, "MOST", 4)
    monkeypatch.setattr(clock, "WARM_UPS", 1)
    monkeypatch.setattr(m2gen.measure.clock, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(clock, "kernels_of", lambda run: KERNELS if run() is not None else ())
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    (tmp_path / "layer_adapters.py").write_text(ADAPTERS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    worker._CLOCKS.clear()
    yield
    worker._CLOCKS.clear()


def served(layer: LayerUnderTest, workload: LayerWorkload = SEQUENCE, step: TimerStep = TimerStep.ADMIT) -> LayerResult:
    """Return the result of the worker's function."""
    return worker.serve(LayerTask(LayerEntry(workload, layer), step))


def operator(folder: Path, name: str, *, timing_only: bool = False) -> LayerUnderTest:
    """Return the layer around an adapter's operator."""
    return LayerUnderTest(LayerKind.OPERATOR, f"layer_adapters:{name}", folder, name, timing_only)


def peer(name: str, *, timing_only: bool = False) -> LayerUnderTest:
    """Return an adapter's layer."""
    return LayerUnderTest(LayerKind.PEER, f"layer_adapters:{name}", None, name, timing_only)


@CALLS
@pytest.mark.parametrize("variant", [VARIANT, GATED], ids=["given", "softplus"])
@pytest.mark.parametrize("kind", ["eager", "compiled", "operator", "attention"])
def test_each_kind_is_checked_and_timed(folder: Path, kind: str, variant: object, workload: LayerWorkload) -> None:
    """Every layer passes, has its memory, kernels and versions, and samples of forward and step, or of a token."""
    workload = replace(workload, variant=variant)  # type: ignore[type-var]
    layer = replace(operator(folder, "right"), kind=LayerKind(kind))
    admitted = served(layer, workload)
    assert (admitted.failure, admitted.unverified) == (None, "")
    assert admitted.extra_bytes == 1000
    assert admitted.kernels == KERNELS
    assert [name for name, _ in admitted.versions] == ["torch", "triton"]
    sampled = served(layer, workload, TimerStep.SAMPLE)
    assert sampled.failure is None
    assert len(sampled.forward_ms) == 4
    assert len(sampled.step_ms) == (0 if workload.call.decodes else 4)
    if workload.call.decodes:
        assert sampled.forward_ms == (REPLAY_MS,) * 4


def test_traffic_of_a_token(folder: Path) -> None:
    """Weights count once, m2gen's states twice, attention's keys and values of all tokens before once."""
    ours = served(replace(operator(folder, "right"), kind=LayerKind.EAGER), TOKEN)
    channels = 16 + 16 + 2 * 16
    projections = HIDDEN * (channels + 2 + 32) + 32 * HIDDEN
    weights = projections + 4 * channels + 2 * 2 + 2 * 16 * 16 + 2 * 16 + 32
    states = 3 * (3 * channels + 2 * 16 * 16)
    assert ours.traffic == 4 * (weights + 2 * states)
    attention = served(LayerUnderTest(LayerKind.ATTENTION), TOKEN)
    tokens = attention.traffic // 4 - 4 * HIDDEN * HIDDEN
    assert tokens % (2 * 3 * HIDDEN) == 0
    assert TOKEN.seq <= tokens // (2 * 3 * HIDDEN) <= TOKEN.seq + makers.ROOM


def test_results_that_are_wrong_have_no_times(folder: Path) -> None:
    """An operator that errs by a hundredth is named, and timed only where that was asked for."""
    failure = served(operator(folder, "wrong")).failure
    assert failure is not None
    assert failure.reason is Reason.WRONG
    assert failure.message.startswith("y of the layer must be within")
    timed = served(operator(folder, "wrong", timing_only=True))
    assert timed.failure is None
    assert timed.unverified == str(failure)
    token = served(operator(folder, "wrong"), TOKEN).failure
    assert token is not None
    assert token.message.startswith("y of decoding must be within")


def test_every_gradient_is_checked() -> None:
    """A layer whose output is right, and one parameter's gradient is not, is named with the parameter."""
    failure = served(peer("scaled")).failure
    assert failure is not None
    assert failure.message.startswith("dbias of the layer must be within")


def test_other_layers() -> None:
    """A peer's layer has its packages' versions; one that does not serve, cannot decode or be imported says so."""
    found = served(peer("square"))
    assert found.failure is None
    versions = dict(found.versions)
    assert versions["jinja2"]
    assert versions["none-such"] == ""
    assert "square decodes nothing" in str(served(peer("square"), TOKEN).failure)
    assert "does not serve" in str(served(peer("nothing")).failure)
    missing = LayerUnderTest(LayerKind.PEER, "none_such_module:f", None, "missing")
    assert "No module named" in str(served(missing).failure)


def test_what_was_not_checked_is_marked() -> None:
    """Without a plain form, or past a package's own guard, times are times only and say why."""
    assert check.NO_REFERENCE in str(served(peer("unknown")).failure)
    assert check.NO_REFERENCE in served(peer("unknown", timing_only=True)).unverified
    assert "needs a newer Triton" in str(served(peer("guarded")).failure)
    found = served(peer("guarded", timing_only=True))
    assert found.failure is None
    assert found.unverified == "needs a newer Triton"


def test_a_layer_can_be_sampled_by_a_new_process(folder: Path) -> None:
    """A worker that was replaced after the check prepares the layer again."""
    layer = replace(operator(folder, "right"), kind=LayerKind.EAGER)
    assert served(layer, step=TimerStep.SAMPLE).step_ms
