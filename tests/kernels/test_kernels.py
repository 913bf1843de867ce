"""Every result and gradient of generated kernels against the float64 reference, within derived budgets."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from support import DIMS, DTYPES, GATED_HEADS, HEADS, SCHEDULES, make_variant

from m2gen.kernels.launch import SHORT
from m2gen.problem import Gates, Problem, make_inputs
from m2gen.runtime import launchers
from m2gen.tune.candidate import load
from m2gen.variant import Variant
from m2gen.verify import TENSORS, Case, CaseReport, Loss, run_case
from m2gen.verify.subject import poisoned

Modules = Callable[[str, str], ModuleType]
RAGGED = Problem(1, 7, initial_state=True)
CLIPS = ("carry", "total")
INTERVAL = 4
"""Checkpoint interval of the schedules ``one_level_atomic`` and ``two_level_atomic``."""


@pytest.fixture
def run(modules: Modules, device: torch.device) -> Callable[..., CaseReport]:
    """Return a function that runs one case on the package of a schedule."""

    def judge(variant: Variant, schedule: str, problem: Problem = RAGGED, seed: int = 0, **facts: object) -> CaseReport:
        case = Case("test", problem, **facts)  # type: ignore[arg-type]
        return run_case(modules(schedule, variant.clip), variant, case, seed, device)

    return judge


def assert_within_budget(report: CaseReport, tensors: tuple[str, ...] = TENSORS) -> None:
    """Fail unless exactly ``tensors`` were judged and none is over its budget."""
    assert report.failure == ""
    assert tuple(result.tensor for result in report.results) == tensors
    assert [result for result in report.results if not result.passed] == []


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("schedule", ["one_level_atomic", "two_level_partial"])
def test_both_clip_modes_far_below_and_far_above_the_bound(run, schedule, scale, clip) -> None:
    """The gradients reach the bound never, sometimes or nearly always, and agree."""
    assert_within_budget(run(make_variant(clip=clip), schedule, dy_scale=scale))


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bound", [None, 0.0, 3.0])
def test_any_bound_or_none(run, bound, clip) -> None:
    """No bound, a bound that lets nothing through, and one other than the default agree."""
    assert_within_budget(run(make_variant(clip=clip), "two_level_atomic", dy_scale=10.0, clip=bound))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("schedule", ["one_level_atomic", "two_level_partial"])
def test_dims_and_dtypes(run, schedule, dims, dtype) -> None:
    """Full and masked tiles, and rows split between two programs, agree in every dtype."""
    assert_within_budget(run(make_variant(*dims, dtype=dtype), schedule, Problem(1, 3, initial_state=True)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_narrow_dtypes_far_from_the_bound(run, scale, dtype) -> None:
    """Gradients that are tiny or large for their dtype neither vanish nor overflow."""
    assert_within_budget(run(make_variant(9, 9, dtype=dtype), "two_level_atomic", dy_scale=scale))


@pytest.mark.parametrize("problem", [Problem(2, 35), Problem(0, 0, lengths=(3, 64, 0, 2))], ids=["padded", "packed"])
def test_atomics_of_long_calls(run, problem) -> None:
    """Calls too long for y to be summed in rows, whatever the schedule says, have it summed by atomics."""
    assert math.prod(problem.lead) > SHORT
    tensors = tuple(name for name in TENSORS if name != "dinitial_state")
    assert_within_budget(run(make_variant(24, 17), "one_level_atomic", problem), tensors)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("schedule", ["two_level_atomic", "one_step_partial"])
def test_head_groups(run, schedule, heads) -> None:
    """Operands shared by all heads, by some or by none agree, with atomics and with partial sums."""
    assert_within_budget(run(make_variant(heads=heads), schedule, Problem(1, 3, initial_state=True)))


def test_the_head_groups_cover_every_operand() -> None:
    """Each of q, k, v, f and w has one head, all four, and two, in some variant."""
    for counts in zip(*HEADS, strict=True):
        assert {1, 2, 4} <= set(counts)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_several_sequences(run, schedule) -> None:
    """Batch rows do not mix."""
    assert_within_budget(run(make_variant(24, 17), schedule, Problem(3, 2, initial_state=True)))


@pytest.mark.parametrize("seq", [1, 2, INTERVAL - 1, INTERVAL, INTERVAL + 1, 2 * INTERVAL])
@pytest.mark.parametrize("schedule", ["one_level_atomic", "two_level_atomic"])
def test_lengths_around_the_checkpoint_interval(run, schedule, seq) -> None:
    """Sequences that end before, at and after a checkpoint agree."""
    assert SCHEDULES[schedule].interval == INTERVAL
    assert_within_budget(run(make_variant(9, 9), schedule, Problem(1, seq, initial_state=True)))


@pytest.mark.parametrize("clip", CLIPS)
def test_no_steps_return_the_initial_state_and_its_gradient(run, clip) -> None:
    """A sequence of length 0 passes the state and its gradient through, unclamped."""
    problem = Problem(2, 0, initial_state=True)
    assert_within_budget(run(make_variant(clip=clip), "two_level_atomic", problem, loss=Loss.STATE, dy_scale=9.0))


@pytest.mark.parametrize("loss", Loss)
@pytest.mark.parametrize("initial", [False, True])
def test_losses_with_and_without_an_initial_state(run, loss, initial) -> None:
    """Gradients that come from y alone, the state alone or both agree."""
    report = run(make_variant(), "two_level_atomic", Problem(1, 5, initial_state=initial), loss=loss)
    assert_within_budget(report, TENSORS if initial else TENSORS[:-1])


PACKED = {
    "empty_first_and_last": (0, INTERVAL + 1, 0, 1, INTERVAL, 0),
    "short": (1, 2, INTERVAL - 1),
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("schedule", ["one_level_atomic", "two_level_partial"])
@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED.keys())
def test_packed_sequences(run, lengths, schedule, clip) -> None:
    """Sequences packed end to end, some of them empty, agree."""
    problem = Problem(0, 0, lengths=lengths, initial_state=True)
    assert_within_budget(run(make_variant(clip=clip), schedule, problem, dy_scale=3.0))


def test_only_empty_packed_sequences(run) -> None:
    """A packed batch without a single token passes the states through."""
    problem = Problem(0, 0, lengths=(0, 0), initial_state=True)
    assert_within_budget(run(make_variant(), "two_level_atomic", problem, loss=Loss.STATE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_slow_gates_in_float32(run, dtype) -> None:
    """Gates of 1 - 1e-4, which bfloat16 rounds to 1, still let the head write when they come in float32."""
    report = run(make_variant(dtype=dtype), "two_level_partial", Problem(1, 9, initial_state=True), gates=Gates.SLOW)
    assert_within_budget(report)


@pytest.mark.parametrize("schedule", ["one_level_atomic", "two_level_partial", "one_step_partial"])
@pytest.mark.parametrize("dims", [(16, 16), (24, 17)])
def test_nothing_is_written_beyond_the_last_sequence(device, schedule, dims) -> None:
    """What tokens have that no sequence has stays as memory is: no kernel writes behind a sequence's end."""
    variant, ends = make_variant(*dims), 5
    x = make_inputs(variant, Problem(0, 0, lengths=(3, 2, 4), initial_state=True), 0).to(device)
    assert None not in (x.cu_seqlens, x.initial_state)
    kernels, offsets = load(variant, SCHEDULES[schedule]), x.cu_seqlens[:3]
    operands = (x.q, x.k, x.v, x.weight, x.forget, None, None)
    with poisoned():
        y, _, saved = launchers.forward(kernels, operands, x.initial_state[:2], offsets, True, True)
        wanted = [True] * 5 + [False] * 3
        found = launchers.backward(kernels, x.dy, x.dstate[:2], operands, saved, offsets, 1.0, wanted, True)
    dq, dk, dv, _, dforget = found
    for result in (y, dq, dk, dv, dforget):
        assert not result[:ends].isnan().any()
        assert result[ends:].isnan().all()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_float32_operands_beside_narrow_ones(run, dtype) -> None:
    """The forget gate and the weight may be float32, between the narrow numbers, beside narrow q, k and v."""
    assert_within_budget(run(make_variant(dtype=dtype), "two_level_partial", wide=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_computed_in_the_kernel(run, dtype) -> None:
    """Results and gradients of x, A_log and dt_bias agree, also next to f = 1 and with several sequences."""
    variant = make_variant(heads=GATED_HEADS, dtype=dtype, gate="softplus")
    tensors = (*TENSORS, "dA_log", "ddt_bias")
    for gates in (Gates.MIXED, Gates.SLOW):
        assert_within_budget(run(variant, "two_level_partial", Problem(2, 3, initial_state=True), gates=gates), tensors)


def test_seeds_change_the_inputs_and_nothing_else(run) -> None:
    """Two seeds give different errors, both within budget; one seed gives the same twice."""
    first, again, second = (run(make_variant(), "two_level_partial", seed=seed) for seed in (1, 1, 2))
    assert first.results == again.results != second.results
    assert_within_budget(second)
