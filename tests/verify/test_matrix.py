"""The cases of a variant."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from support import make_variant

from m2gen.device import TARGETS
from m2gen.kernels.launch import SHORT
from m2gen.pipeline import open_spec
from m2gen.pipeline.verify import MATRIX
from m2gen.schedule import Family, default, parse
from m2gen.spec import ClipMode, Dtype, GateKind
from m2gen.variant import expand
from m2gen.verify import Check, Feature, cases, quick
from m2gen.verify.checks import CHECKS

GATED = make_variant(dtype="bf16", gate="softplus")


def test_every_check_has_a_function() -> None:
    """No case asks for what nobody does."""
    assert set(CHECKS) == set(Check)


@pytest.mark.parametrize("interpreted", [True, False])
def test_every_feature_has_a_case(interpreted) -> None:
    """A narrow variant with groups, and one that computes its gate, have a case of every feature between them."""
    variants = [make_variant(dtype="bf16", rows=9), GATED]
    features = {case.feature for v in variants for case in cases(v, 16, interpreted=interpreted)}
    assert features == set(Feature) - ({Feature.DRIFT} if interpreted else set())


@pytest.mark.parametrize("interpreted", [True, False])
def test_names_are_unique(interpreted) -> None:
    """A name and a variant say which case to run again."""
    for interval in (1, 4, 16, 64):
        names = [case.name for case in cases(GATED, interval, interpreted=interpreted)]
        assert len(names) == len(set(names))


def test_lengths_of_the_contract() -> None:
    """The lengths are 0, 1, 2, around the interval and around 64, and on a GPU 4096."""
    found = cases(make_variant(), 16, interpreted=False)
    lengths = {case.problem.seq for case in found if case.name.startswith("steps_") and case.feature == "recurrence"}
    assert lengths == {0, 1, 2, 15, 16, 17, 63, 64, 65, 4096}


@pytest.mark.parametrize("interval", [1, 3, 8, 10, 16, 64])
def test_a_packed_batch_is_cut_into_segments(interval: int) -> None:
    """On a GPU there is one whose mean sequence is longer than a segment, with a sequence that is shorter."""
    schedule = replace(parse("mma_f64x2u8a_b64x2c1a_i16_s7_ptx"), interval=interval)
    found = {case.name: case.problem for case in cases(make_variant(), interval, interpreted=False)}
    lengths = found["segments_from_states"].lengths
    assert lengths is not None
    assert sum(lengths) > len(lengths) * schedule.shortest_segment
    assert min(lengths) < schedule.shortest_segment
    assert "segments_from_states" not in {case.name for case in cases(make_variant(), interval, interpreted=True)}


@pytest.mark.parametrize("interval", [1, 4, 16, 64])
@pytest.mark.parametrize("interpreted", [True, False])
def test_y_is_added_up_by_atomics(interval: int, interpreted: bool) -> None:
    """Where programs share a head's rows, a case that asks for no determinism has more tokens than short calls have.

    On a GPU that is the first case, which quick runs have for every variant.
    """
    found = cases(make_variant(64, 16, (1, 1, 2, 2, 2)), interval, interpreted=interpreted)
    long = [case for case in found if math.prod(case.problem.lead) > SHORT and not case.deterministic]
    assert long
    if not interpreted:
        assert long[0] == found[0]


def test_long_sequences_are_for_small_states() -> None:
    """A state too large for the eager reference's backward has no case of thousands of steps."""
    large = make_variant(64, 16, (1, 1, 132, 132, 132), "bf16")
    assert max(case.problem.seq for case in cases(large, 16, interpreted=False)) <= 65


def test_long_sequences_reach_the_kernels_of_the_published_models() -> None:
    """A variant of the shipped matrix with their state, dtype and numerics has the cases of thousands of steps."""
    variants = [built.variant for built in expand(open_spec("matrix.yaml")[0])]
    published = [v for v in variants if (v.state_expansion, v.head_dim, v.dtype, v.gate) == (64, 16, "bf16", "given")]
    schedules = {v: default(v, TARGETS["sm_90"]) for v in published}
    assert {s.forward.rows for s in schedules.values()} == {64}
    assert {s.family for s in schedules.values()} == {Family.MMA}
    names = {case.name for v, s in schedules.items() for case in cases(v, s.interval, interpreted=False)}
    assert {"steps_4096", "steps_16384"} <= names


def test_the_matrix_reaches_warpgroups() -> None:
    """With either clip, gate and narrow dtype, one and several programs for a head's rows, and masked tiles."""
    specs = [open_spec(name)[0] for name in ("matrix.yaml", "matrix_total.yaml")]
    variants = [built.variant for spec in specs for built in expand(spec)]
    grouped = [v for v in variants if default(v, TARGETS["sm_90"]).family is Family.WGMMA]
    assert {v.clip for v in grouped} == set(ClipMode)
    assert {v.gate for v in grouped} == set(GateKind)
    assert {v.dtype for v in grouped} == {Dtype.BF16, Dtype.FP16}
    assert {v.padded_rows // 64 for v in grouped} == {1, 2, 4}
    assert any(v.masks_rows and v.masks_cols for v in grouped)
    assert any(len(set(v.heads.counts)) > 1 for v in grouped)


def test_the_interpreter_walks_no_large_state() -> None:
    """With too many tiles a single short case is left."""
    (case,) = cases(make_variant(64, 16, (1, 1, 132, 132, 132)), 16, interpreted=True)
    assert (case.name, case.problem.seq) == ("ragged", 3)


def test_quick_has_one_case_of_every_feature() -> None:
    """Every variant has its first case, and every feature one, on a small variant; they are cases of the whole run."""
    variants = {make_variant(64, 64, dtype="bf16"): 16, make_variant(9, 9, dtype="bf16"): 16, GATED: 16}
    chosen = quick(variants, interpreted=True)
    assert [variant for variant, case in chosen if case.name == "ragged"] == list(variants)
    features = [case.feature for _, case in chosen]
    assert set(features) == set(Feature) - {Feature.DRIFT}
    assert len(features) == len(variants) + len(Feature) - 2
    assert all(case in cases(variant, 16, interpreted=True) for variant, case in chosen)
    assert all(v.padded_cols == 16 for v, case in chosen if case.name != "ragged")


def test_the_full_matrix_has_what_the_contract_lists() -> None:
    """Dims, dtypes, head counts, gates, clips, tanh and products of issue-sized sweeps are in the shipped specs."""
    variants = [built.variant for spec in MATRIX for built in expand(open_spec(spec)[0])]
    sizes = {(v.state_expansion, v.head_dim, v.dtype) for v in variants}
    rows, cols = (1, 9, 16, 24, 64, 96, 128, 256), (8, 9, 16, 24, 32, 64, 128)
    assert {(k, v, dtype) for k in rows for v in cols for dtype in Dtype} <= sizes
    assert {1, 7, 84, 132, 346} <= {v.total_heads for v in variants}
    for total in (84, 132, 346):
        grouped = [v.heads.counts for v in variants if v.total_heads == total]
        for counts in zip(*grouped, strict=True):
            assert {1, total} < set(counts)
    assert {(v.clip, v.tanh) for v in variants} == {("carry", "approx"), ("total", "exact")}
    assert {v.gate for v in variants} == {"given", "softplus"}
    assert {v.products for v in variants} == {"ieee", "tf32"}
    assert {v.dtype for v in variants if v.clip == "total"} == set(Dtype)
