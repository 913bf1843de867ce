"""Each check fails a package that breaks what the check is about, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, pairwise
from typing import Any

import pytest
import torch
from calls import operators_of
from reference_package import reference_package
from support import make_variant
from torch import Tensor

from m2gen.problem import Problem
from m2gen.verify import Case, CaseReport, Check, run_case
from m2gen.verify.subject import poisoned

VARIANT = make_variant()
PROBLEM = Problem(2, 4, initial_state=True)
PACKED = Problem(0, 0, lengths=(3, 2), initial_state=True)
UNINITIALISED = (Check.GRADIENTS, Check.SINGLE, Check.INFERENCE, Check.CHUNKED, Check.REPEATED, Check.DECODING)
"""Checks that say which memory is not initialised."""

Wrapper = Callable[[Any], Any]


def report_of(check: Check, wrong: Wrapper | None = None, problem: Problem = PROBLEM) -> CaseReport:
    """Return the report of one check on the reference, whose operator is made wrong by a wrapper."""
    package = reference_package(VARIANT)
    if problem is PACKED:
        package.m2rnn = _alone(package.m2rnn)
    if wrong:
        package.m2rnn = wrong(package.m2rnn)
    return run_case(package, VARIANT, Case("test", problem, check=check), 0, torch.device("cpu"))


def missed(report: CaseReport) -> set[str]:
    """Return the tensors that are wrong in a report that has no other failure."""
    assert report.failure == ""
    return {result.tensor for result in report.results if not result.passed}


def _alone(right: Any) -> Any:
    """Return an operator that computes each sequence of a packed batch by itself, whose bits are then its own."""

    def call(*operands: Any, **facts: Any) -> tuple[Tensor, Tensor]:
        q, k, v, weight, forget, state, offsets = operands
        if offsets is None:
            return right(*operands, **facts)
        parts = []
        for index, (start, end) in enumerate(pairwise(offsets.tolist())):
            steps = [x[start:end].unsqueeze(0) for x in (q, k, v, forget)]
            parts.append(right(*steps[:3], weight, steps[3], state[index : index + 1], None, **facts))
        return torch.cat([y.squeeze(0) for y, _ in parts]), torch.cat([after for _, after in parts])

    return call


def _varying(right: Any) -> Any:
    """Have every second call differ in the last bit."""
    calls = count()

    def call(*operands: Any, **facts: Any) -> tuple[Tensor, Tensor]:
        y, state = right(*operands, **facts)
        return y * (1 + next(calls) % 2 * 2.0**-23), state

    return call


def _always_with_state(right: Any) -> Any:
    return lambda *operands, **facts: right(*operands, **{**facts, "output_final_state": True})


def _forgetful(right: Any) -> Any:
    """Have calls of fewer steps than the problem has begin from no state."""

    def call(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, forget: Tensor, state: Any, *rest: Any, **facts: Any):
        return right(q, k, v, weight, forget, state if q.shape[1] == PROBLEM.seq else None, *rest, **facts)

    return call


def _wrong_alone(right: Any) -> Any:
    """Double the gradient of an operand if it is wanted alone."""

    def call(*operands: Any, **facts: Any) -> tuple[Tensor, Tensor]:
        y, state = right(*operands, **facts)
        wanted = sum(isinstance(x, Tensor) and x.requires_grad for x in operands)
        if wanted == 1 and y.requires_grad:
            y.register_hook(lambda gradient: 2 * gradient)
        return y, state

    return call


def _unwritten(right: Any) -> Any:
    """Leave y as memory is: a number that is not uninitialised happens to be the right one."""

    def call(*operands: Any, **facts: Any) -> tuple[Tensor, Tensor]:
        y, state = right(*operands, **facts)
        return y.masked_fill(torch.empty_like(y).isnan(), torch.nan), state

    return call


@pytest.mark.parametrize("check", UNINITIALISED)
def test_memory_that_is_not_written_is_seen(check: Check) -> None:
    """An operator that leaves y as it finds it is wrong in every check, whatever the memory held before."""
    assert report_of(check).passed
    assert missed(report_of(check, _unwritten))


def test_memory_is_poisoned_only_within() -> None:
    """All that is allocated is NaN meanwhile, and torch's mode is afterwards what it was."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with poisoned():
        assert torch.empty(1000).isnan().all()
    after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert after == before


@pytest.mark.parametrize(("check", "wrong", "tensors"), [
    (Check.REPEATED, _varying, {"y"}),
    (Check.CHUNKED, _forgetful, {"y", "state"}),
    (Check.SINGLE, _wrong_alone, {"dq", "dk", "dv", "dweight", "dforget", "dinitial_state"}),
])  # fmt: skip
def test_wrong_tensors_are_named(check: Check, wrong: Wrapper, tensors: set[str]) -> None:
    """Calls that vary, pieces that lose the state, and gradients that are wrong if wanted alone fail their check."""
    assert report_of(check).passed
    assert tensors <= missed(report_of(check, wrong))


def test_a_state_that_nobody_wanted_is_refused() -> None:
    """An operator that returns the state whatever is asked fails, though the state is right."""
    report = report_of(Check.INFERENCE, _always_with_state)
    assert not report.passed
    assert "the state must be None with output_final_state=False" in report.failure


def test_a_step_on_a_copy_of_the_state_is_refused() -> None:
    """A step that returns the right state in other memory fails, since the next step would begin from the old one."""
    package = reference_package(VARIANT)
    right = package.m2rnn_step

    def step(*operands: Any, **facts: Any) -> tuple[Tensor, Tensor]:
        y, state = right(*operands, **facts)
        return y, state.clone()

    package.m2rnn_step = step
    report = run_case(package, VARIANT, Case("test", PROBLEM, check=Check.DECODING), 0, torch.device("cpu"))
    assert not report.passed
    assert "must update the state in place" in report.failure


def _wrong_state_packed(right: Any) -> Any:
    def call(*operands: Any, **facts: Any) -> tuple[Tensor, Tensor]:
        y, state = right(*operands, **facts)
        return y, state if operands[6] is None else state + (state * 2.0**-23).detach()

    return call


def _wrong_gradient_packed(right: Any) -> Any:
    def call(*operands: Any, **facts: Any) -> tuple[Tensor, Tensor]:
        if operands[6] is None:
            return right(*operands, **facts)
        state = operands[5].clone()
        state.register_hook(lambda gradient: gradient * (1 + 2.0**-23))
        return right(*operands[:5], state, operands[6], **facts)

    return call


@pytest.mark.parametrize(("wrong", "tensor"), [
    (_wrong_state_packed, "state"),
    (_wrong_gradient_packed, "dinitial_state"),
])  # fmt: skip
def test_states_of_packed_sequences_are_their_own(wrong: Wrapper, tensor: str) -> None:
    """A last bit of a state, or of its gradient, that neighbours in a packed batch change fails the check."""
    assert report_of(Check.ISOLATED, problem=PACKED).passed
    assert missed(report_of(Check.ISOLATED, wrong, PACKED)) == {tensor}


def test_a_control_that_is_within_budget_fails() -> None:
    """So few steps lose nothing in a narrow state: the check says that its case shows nothing."""
    variant = make_variant(dtype="bf16")
    case = Case("test", Problem(1, 4), check=Check.DRIFT)
    report = run_case(reference_package(variant), variant, case, 0, torch.device("cpu"))
    assert "y_of_bf16_loop" in missed(report)


def test_a_layer_that_is_wrong_unless_deterministic_is_seen(modules, device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is judged as training calls it, too: its kernels may sum by atomics then, and not where memory is NaN."""
    package = modules("one_level_atomic", "carry")
    launches = operators_of(package).launches
    right = launches.forward

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        y, *states = right(*arguments)
        return (y if arguments[4] else 2 * y, *states)

    case = Case("test", Problem(2, 3), check=Check.LAYER)
    assert run_case(package, VARIANT, case, 0, device).passed
    monkeypatch.setattr(launches, "forward", forward)
    wrong = missed(run_case(package, VARIANT, case, 0, device))
    assert "y_as_usual" in wrong
    assert all(name.endswith("_as_usual") for name in wrong)
