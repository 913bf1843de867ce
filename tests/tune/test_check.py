"""The check compares real kernels with float64 in the interpreter; the worker and the clock run on a stand-in GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from stand_in import REPLAY_MS, stand_in_gpu
from support import make_schedule, make_variant

from m2gen.db import Reason, TensorError
from m2gen.device import TARGETS
from m2gen.kernels.compile import load_kernels
from m2gen.kernels.lowering import Lowering
from m2gen.kernels.render import render_kernel
from m2gen.measure import checks
from m2gen.measure import gpu as measure
from m2gen.measure.checks import Verdict, seeded_cases, verdict_of
from m2gen.measure.gpu import raised
from m2gen.runtime import launchers
from m2gen.schedule import Schedule
from m2gen.spec import Objective
from m2gen.tune import clock, gpu
from m2gen.tune.candidate import load
from m2gen.tune.check import Candidate, check_candidate
from m2gen.tune.space import Subject
from m2gen.tune.trial import Measurement, Step, Task
from m2gen.variant import Variant
from m2gen.verify import TensorResult

STEPS = 6
VARIANT = make_variant(heads=(1, 1, 2, 2, 2))
PARTIAL = make_schedule("partial", interval=4)
TENSORS = {"y", "state", "dq", "dk", "dv", "dweight", "dforget", "dinitial_state"}


def candidate(
    variant: Variant, schedule: Schedule, objective: Objective = Objective.TRAIN, *changes: tuple[str, str]
) -> Candidate:
    """Return a loaded candidate, whose text was changed."""
    text = render_kernel(Lowering(variant, schedule))
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return Candidate(load_kernels(text), variant, schedule, objective)


def passed(tested: Candidate) -> Verdict:
    """Return the verdict of the first check."""
    return check_candidate(tested, seeded_cases(tested.variant, STEPS), torch.device("cpu"))


@pytest.mark.parametrize("gate_kind", ["given", "softplus"])
def test_every_tensor_is_judged(gate_kind: str) -> None:
    """A right candidate passes both checks, and every output and gradient has an error below its budget."""
    variant = make_variant(heads=(1, 1, 2, 2, 2), gate=gate_kind)
    tested = candidate(variant, PARTIAL)
    for held_out in (False, True):
        verdict = check_candidate(tested, seeded_cases(variant, STEPS, held_out=held_out), torch.device("cpu"))
        assert verdict.failure is None
        expected = TENSORS | ({"dA_log", "ddt_bias"} if gate_kind == "softplus" else set())
        assert {error.tensor for error in verdict.errors} == expected
        assert all(0 < error.error <= error.budget for error in verdict.errors)


def test_inference_is_judged_by_its_results() -> None:
    """No gradient is asked for, and nothing is saved."""
    verdict = passed(candidate(VARIANT, PARTIAL, Objective.INFER))
    assert verdict.failure is None
    assert {error.tensor for error in verdict.errors} == {"y", "state"}


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (("g = clamp(c, bound) +", "g = c +"), "of plain"),
        (("u_0 * z_0 * z_0", "u_0 * z_0"), "of plain"),
        (("cols[None, :], sum_dw, mask=mask)", "cols[None, :], 1.001 * sum_dw, mask=mask)"), "dweight of plain"),
        (("if tl.cast(t, tl.int32) % INTERVAL == 0:", "if t == 0:"), "of plain"),
    ],
)
def test_a_wrong_candidate_is_named(change: tuple[str, str], tensor: str) -> None:
    """A clamp left out, a wrong derivative, a small scale, checkpoints that are never written: all are seen."""
    verdict = passed(candidate(VARIANT, PARTIAL, Objective.TRAIN, change))
    assert verdict.failure is not None
    assert verdict.failure.reason is Reason.WRONG
    assert tensor in verdict.failure.message
    assert "must be within" in verdict.failure.message


def test_bits_that_do_not_repeat_are_wrong_only_where_they_are_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bit of dq changes from call to call: a failure of partial sums, the order of atomics otherwise."""
    backward = launchers.backward
    for reduction, fails in (("partial", True), ("atomic", False)):
        calls = [0]

        def shaken(*arguments: Any, calls: list[int] = calls) -> list[torch.Tensor]:
            found = backward(*arguments)
            calls[0] += 1
            found[0] *= 1 + (calls[0] % 2) * 2.0**-23
            return found

        monkeypatch.setattr(launchers, "backward", shaken)
        failure = passed(candidate(VARIANT, make_schedule(reduction, interval=4))).failure
        assert (failure is not None) == fails
        if failure:
            assert "dq of plain must have the same bits" in failure.message


def test_the_held_out_problems_are_others() -> None:
    """Other sizes, other seeds; plain steps are beyond every interval that is searched and a multiple of 16."""
    seen, unseen = seeded_cases(VARIANT, checks.STEPS), seeded_cases(VARIANT, checks.STEPS, held_out=True)
    assert not {q.seed for q in seen} & {q.seed for q in unseen}
    assert not {q.case.problem for q in seen} & {q.case.problem for q in unseen}
    from m2gen.tune.coordinates import AXES

    longest = max(value for value in AXES["interval"] if isinstance(value, int))
    for asked in (*seen[:2], *unseen[:2]):
        assert asked.case.problem.seq > longest
        assert asked.case.problem.seq % 16 == 0


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the worker use the CPU, and a clock that counts replays."""

    stand_in_gpu(monkeypatch)
    monkeypatch.setattr(measure, "TORCH_DEVICE", "cpu")
    monkeypatch.setattr(checks, "STEPS", STEPS)
    gpu._CLOCKS.clear()
    yield
    gpu._CLOCKS.clear()


SUBJECT = Subject(VARIANT, TARGETS["sm_90"], Objective.TRAIN, 1, 8)


def served(step: Step, schedule: Schedule = PARTIAL, best_ms: float | None = None) -> Measurement:
    """Return the result of the worker's function."""
    return gpu.serve(Task(SUBJECT, schedule, step, best_ms))


@pytest.mark.usefixtures("stand_in")
def test_the_workers_steps() -> None:
    """Prepared, checked and timed, checked on held-out problems, timed again: every step gives what it should."""
    assert served(Step.PREPARE).failure is None
    screened = served(Step.SCREEN)
    assert screened.failure is None, screened.details
    assert {error.tensor for error in screened.errors} == TENSORS
    assert screened.samples is not None
    assert len(screened.samples.forward_ms) == len(screened.samples.backward_ms) == clock.MOST
    assert set(screened.samples.call_ms) == {2 * REPLAY_MS}
    assert screened.samples.peak_bytes == 1000
    held_out = served(Step.HELD_OUT)
    assert (held_out.failure, held_out.samples) == (None, None)
    again = served(Step.TIME)
    assert again.samples is not None
    assert len(again.samples.call_ms) == clock.AGAIN


@pytest.fixture
def unchecked(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the worker time candidates without looking at their results."""
    monkeypatch.setattr("m2gen.tune.check.check_candidate", lambda *_: Verdict(()))


@pytest.mark.usefixtures("unchecked")
def test_far_slower_candidates_are_dropped_after_a_few_samples() -> None:
    """Beyond a part of the best, only the fewest samples are taken; up to it, as many as the time is for."""
    best = 2 * REPLAY_MS / clock.FAR_SLOWER
    for best_ms, count in ((0.99 * best, clock.FEWEST), (1.01 * best, clock.MOST)):
        screened = served(Step.SCREEN, best_ms=best_ms)
        assert screened.samples is not None
        assert len(screened.samples.call_ms) == count


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("replay_ms", "count"), [(5.0, 15), (100.0, clock.FEWEST)])
def test_slow_candidates_are_sampled_less(replay_ms: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are as many calls as fit the time to sample, forward and backward together."""
    monkeypatch.setattr("stand_in.REPLAY_MS", replay_ms)
    screened = served(Step.SCREEN)
    assert screened.samples is not None
    assert len(screened.samples.call_ms) == count


@pytest.mark.usefixtures("stand_in")
def test_whatever_a_candidate_raises_is_its_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classified by what was raised, with a traceback; errors of a kernel make the process suspect, others not."""
    kinds: dict[type[Exception], Reason] = {
        RuntimeError: Reason.CRASH,
        torch.OutOfMemoryError: Reason.MEMORY,
        **{
            type(name, (Exception,), {}): Reason.LAUNCH for name in ("OutOfResources", "CompilationError", "PTXASError")
        },
        type("CompileTimeAssertionFailure", (type("CompilationError", (Exception,), {}),), {}): Reason.LAUNCH,
    }
    for kind, reason in kinds.items():

        def broken(*_: object, kind: type[Exception] = kind) -> object:
            raise kind("no luck")

        monkeypatch.setattr("m2gen.tune.candidate.load", broken)
        found = served(Step.SCREEN)
        assert found.failure is not None
        assert found.failure.reason is reason
        assert "no luck" in found.failure.message
        assert "Traceback" in found.details
        assert gpu.GPU.suspect(found) == (reason is Reason.CRASH)


def test_whatever_is_raised_can_be_recorded() -> None:
    """A record's message is one line of printable ASCII, whatever a driver says, and no longer than it may be."""
    message = raised(RuntimeError("größer als\n\x00 erlaubt " + "x" * 1000)).message
    assert re.fullmatch("[ -~]{500}", message)
    assert message.startswith("RuntimeError: gr\\xf6\\xdfer als ? erlaubt xxx")


def test_a_candidate_is_loaded_from_the_file_that_was_compiled() -> None:
    """Its kernels' module is that of the rendered text, so Triton's cache knows it."""
    module = load(VARIANT, PARTIAL)
    assert module is load_kernels(render_kernel(Lowering(VARIANT, PARTIAL)))
    assert replace(PARTIAL, interval=8).slug not in (module.__doc__ or "")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_worst_error_is_the_largest_part_of_its_budget(order: tuple[int, int]) -> None:
    """A small error that nearly fills its budget says more than a large one that does not."""
    large, near = TensorResult("y", 1e-3, 1e-1), TensorResult("y", 5e-4, 6e-4)
    verdict = verdict_of(("plain", (large, near)[i]) for i in order)
    assert verdict == Verdict((TensorError("y", 5e-4, 6e-4),))
