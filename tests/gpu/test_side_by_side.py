"""The benchmark's worker on a real GPU: each kind of implementation is checked, captured and timed in rounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import default_package, make_variant

from m2gen.bench.entries import BenchContext, BenchWorkload, Implementation, serving_workloads
from m2gen.bench.kinds import Call, Kind
from m2gen.bench.side_by_side import side_by_side
from m2gen.bench.sweep import fit
from m2gen.cache import materialise
from m2gen.device import detect
from m2gen.measure.statistics import difference
from m2gen.pipeline.bench import this_bench_context
from m2gen.schedule import default

pytestmark = pytest.mark.gpu

VARIANT = make_variant(32, 16, (1, 1, 4, 4, 4), dtype="bf16", tanh="approx")


@pytest.fixture(scope="module")
def context() -> Iterator[BenchContext]:
    """Hold the GPU at hand, with its worker."""
    with this_bench_context("these tests") as made:
        yield made


@pytest.fixture(scope="module")
def implementations() -> dict[Kind, Implementation]:
    """Return one implementation of each kind but peers and tuned."""
    device = detect()
    assert device is not None
    schedule = default(VARIANT, device)
    folder = materialise("packages/benched", default_package("benched", [VARIANT]).files)
    made = [Implementation(Kind.DEFAULT, schedule, "default", folder)]
    made += [Implementation(kind, schedule) for kind in (Kind.EAGER, Kind.COMPILED)]
    made += [Implementation(Kind.PEER, schedule, "reference_peer:adapter", label="peer")]
    return {implementation.kind: implementation for implementation in made}


@pytest.fixture(autouse=True)
def _peer(tmp_path, monkeypatch) -> None:
    text = "def adapter(variant):\n    from m2gen.verify.oracle import eager, own_arithmetic\n"
    text += "    return eager(variant, own_arithmetic(variant))\n"
    (tmp_path / "reference_peer.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "workload",
    [BenchWorkload("base", VARIANT, 8, 64), *serving_workloads("base", VARIANT, 8)],
    ids=lambda w: str(w.call),
)
def test_every_kind_is_timed(context, implementations, workload) -> None:
    """Times are there, positive, within their intervals, and no faster than any floor."""
    loops = not workload.packed and not workload.call.pooled
    kinds = [kind for kind in implementations if workload.call is Call.SEQUENCE or (loops and kind is not Kind.PEER)]
    kinds = kinds or [Kind.DEFAULT]
    results = side_by_side(workload, [implementations[kind] for kind in kinds], context)
    for result in results:
        assert result.failure is None, result.entry.implementation.name
        for timing in filter(None, (result.forward, result.step)):
            estimate = timing.estimate
            assert 0 < estimate.low_ms <= estimate.median_ms <= estimate.high_ms
            assert all(part < 1.2 for part in timing.parts.values())
        assert (result.step is None) == (workload.call is not Call.SEQUENCE)
    assert results[0].found.host_us is not None


def test_replays_compute_what_is_timed(context, implementations) -> None:
    """A sequence eight times as long takes longer: a graph that lost its kernels would not."""
    found = []
    for seq in (256, 1024, 2048):
        (result,) = side_by_side(BenchWorkload("base", VARIANT, 8, seq), [implementations[Kind.DEFAULT]], context)
        assert result.forward is not None
        assert result.step is not None
        found.append((seq, result.forward.estimate.median_ms, result.step.estimate.median_ms))
    for column in (1, 2):
        line = fit([row[0] for row in found], [row[column] for row in found])
        assert line is not None
        assert line.slope_ms > 0
        assert found[2][column] > 3 * found[0][column]


def test_a_binary_beside_itself(context, implementations) -> None:
    """Two captures of one kernel are timed as one binary, with finite noise."""
    results = side_by_side(BenchWorkload("base", VARIANT, 8, 512), [implementations[Kind.DEFAULT]], context, arms=2)
    one, other = (result.found.step_ms for result in results)
    assert one
    assert other
    assert 0 <= difference(one, other, 0) < 1
