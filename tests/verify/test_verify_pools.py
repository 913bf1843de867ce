"""Checks of calls on pools pass a built package, and fail one that takes or leaves a state in the wrong place."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support import SCHEDULES, build_package, import_package, make_variant
from torch import Tensor

from m2gen.problem import Problem
from m2gen.verify import Case, CaseReport, Check, run_case

VARIANT = make_variant(4, 4)
SCHEDULE = SCHEDULES["two_level_partial"]
PROBLEMS = {
    Check.POOL: Problem(2, 6, initial_state=True),
    Check.POOL_PROMPTS: Problem(0, 0, lengths=(2, 0, 3)),
    Check.POOL_KEPT: Problem(2, 2 * SCHEDULE.interval, initial_state=True),
    Check.LAYER_POOL: Problem(2, 6),
}

Wrapper = Callable[[Any], Any]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return an imported package of one variant."""
    folder = tmp_path_factory.mktemp("verified_pools") / "verified_pools"
    return import_package(folder, build_package("verified_pools", [VARIANT], SCHEDULE), "m2gen_test_verified_pools")


def report_of(package: Any, check: Check, narrow: bool = False) -> CaseReport:
    """Return the report of one check on the CPU or the GPU that kernels run on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return run_case(package, VARIANT, Case("test", PROBLEMS[check], narrow_state=narrow, check=check), 0, device)


def with_wrong(package: ModuleType, name: str, wrong: Wrapper) -> SimpleNamespace:
    """Return the package's operators, of which one is wrong."""
    operators = {operator: getattr(package, operator) for operator in ("m2rnn", "m2rnn_step", "m2rnn_steps")}
    return SimpleNamespace(__name__=package.__name__, **{**operators, name: wrong(operators[name])})


@pytest.mark.parametrize(
    ("check", "narrow"), [*((check, False) for check in PROBLEMS), (Check.POOL, True)], ids=lambda x: str(x)
)
def test_a_package_on_its_pools(package, check, narrow) -> None:
    """What was built passes."""
    report = report_of(package, check, narrow)
    assert (report.failure, [x for x in report.results if not x.passed]) == ("", [])
    assert {"y", "state"} <= {result.tensor for result in report.results}


def _spills(right: Any) -> Any:
    """Leave a state in a slot that no request has, too: the last of the seed's order."""

    def call(*operands: Any, **where: Any) -> tuple[Tensor, Tensor]:
        y, pool = right(*operands, **where)
        every = where.get("pool", pool)
        every[torch.randperm(every.shape[0], generator=torch.Generator().manual_seed(0))[-1]] = 0
        return y, pool

    return call


def _computes_skipped(right: Any) -> Any:
    def call(*operands: Any, **where: Any) -> tuple[Tensor, Tensor]:
        y, pool = right(*operands, **where)
        y[-1] = 1
        return y, pool

    return call


def _keeps_every_draft(right: Any) -> Any:
    return lambda *operands, **where: right(*operands, **{**where, "accepted": where["accepted"] + 1})


def _ignores_slots_to_write(right: Any) -> Any:
    return lambda *operands, **where: right(*operands, **{**where, "out_indices": where["indices"]})


def _starts_from_slots(right: Any) -> Any:
    return lambda *operands, **where: right(*operands, **{**where, "has_initial_state": None})


def _swaps_pages(right: Any) -> Any:
    def call(*operands: Any, **where: Any) -> tuple[Tensor, Tensor]:
        return right(*operands, **{**where, "states_indices": where["states_indices"].flip(1)})

    return call


def _copies_the_pool(right: Any) -> Any:
    return lambda *operands, **where: (right(*operands, **where)[0], operands[5].clone())


MISTAKES = {
    "a_token_spills": ("m2rnn_step", _spills, Check.POOL, {"other_slots"}),
    "a_prompt_spills": ("m2rnn", _spills, Check.POOL_PROMPTS, {"other_slots"}),
    "who_is_skipped_has_results": ("m2rnn_step", _computes_skipped, Check.POOL, {"skipped"}),
    "wrong_drafts_count": ("m2rnn_steps", _keeps_every_draft, Check.POOL, {"y", "state"}),
    "prompts_end_where_they_begin": ("m2rnn", _ignores_slots_to_write, Check.POOL_PROMPTS, {"state", "other_slots"}),
    "prompts_from_zeros_read_slots": ("m2rnn", _starts_from_slots, Check.POOL_PROMPTS, {"y", "state"}),
    "states_of_other_tokens": ("m2rnn", _swaps_pages, Check.POOL_KEPT, {"state_after_half", "state_after_all"}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(package, name) -> None:
    """It is the tensors that are wrong which fail, and no others."""
    operator, wrong, check, missed = MISTAKES[name]
    report = report_of(with_wrong(package, operator, wrong), check)
    assert (report.failure, {x.tensor for x in report.results if not x.passed}) == ("", missed)


def test_the_pool_itself_is_returned(package) -> None:
    """An engine holds the pool, so that another with the same states is of no use."""
    report = report_of(with_wrong(package, "m2rnn_step", _copies_the_pool), Check.POOL)
    assert "must return the pool that it was given" in report.failure


def test_a_layer_that_loses_its_convolutions_past_is_seen(package, monkeypatch) -> None:
    """The last inputs of the convolution are states, too."""
    pools = package.M2RNNPool
    right = pools.prefill

    def prefill(self: Any, *operands: Any, **where: Any) -> Tensor:
        y = right(self, *operands, **where)
        slots = where.get("out_indices", operands[1])
        self.conv[slots.long()] = 0
        return y

    monkeypatch.setattr(pools, "prefill", prefill)
    report = report_of(package, Check.LAYER_POOL)
    assert report.failure == ""
    assert "y" in {x.tensor for x in report.results if not x.passed}
