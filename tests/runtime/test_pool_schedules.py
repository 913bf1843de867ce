"""Any schedule over a pool gives each request what it has alone, bit for bit, and leaves slots of nobody alone."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from serving import DRAFTS, Engine
from support import SCHEDULES, build_package, import_package, make_variant

VARIANTS = {"fp32": make_variant(4, 4), "bf16": make_variant(4, 4, (1, 2, 2, 1, 2), "bf16")}
REQUESTS, SLOTS, LENGTH = 3, 10, 8


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return an imported package."""
    built = build_package("served", VARIANTS.values(), SCHEDULES["two_level_partial"])
    return import_package(tmp_path_factory.mktemp("served") / "served", built, "m2gen_test_served")


KEYS = st.integers(0, REQUESTS - 1)
SEVERAL = st.lists(KEYS, min_size=1, max_size=REQUESTS, unique=True)
TICK = st.one_of(
    st.tuples(st.just("arrive"), KEYS, st.integers(1, LENGTH)),
    st.tuples(st.just("prefill"), st.dictionaries(KEYS, st.integers(1, 3), min_size=1)),
    st.tuples(st.just("decode"), SEVERAL, st.integers(0, 2)),
    st.tuples(st.just("draft"), st.dictionaries(KEYS, st.integers(1, DRAFTS), min_size=1)),
    st.tuples(st.just("cancel"), KEYS),
    st.tuples(st.just("evict"), KEYS),
    st.tuples(st.just("resume"), KEYS),
)
"""An event of a schedule, with its arguments; one that nobody is there for does nothing."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(engine: Engine, schedule: list[tuple[Any, ...]]) -> None:
    """Let two requests begin, and everything of a schedule happen after that."""
    for key in (0, 1):
        engine.arrive(key, LENGTH)
    engine.prefill({0: 2, 1: 1})
    engine.check()
    for name, *rest in schedule:
        getattr(engine, name)(*rest)
        engine.check()


@pytest.mark.parametrize("kind", DTYPES)
@settings(max_examples=12, phases=(Phase.explicit, Phase.generate))  # to shrink one takes minutes
@given(schedule=st.lists(TICK, min_size=2, max_size=7), seed=st.integers(0, 99))
def test_any_schedule_is_each_request_alone(package, kind, schedule, seed) -> None:
    """Chunks of prompts, steps with padding, drafts with rejections, cancellations, evictions and resumptions."""
    run(Engine(package, VARIANTS[kind], SLOTS, DTYPES[kind], 1000 * seed), schedule)


LONG = [
    ("arrive", 2, 5), ("draft", {0: 2, 1: 1}), ("prefill", {2: 3, 0: 1}), ("decode", [2, 0, 1], 2), ("draft", {1: 3}),
    ("evict", 1), ("arrive", 2, 4), ("decode", [0, 1, 2], 0), ("cancel", 0), ("resume", 1), ("arrive", 0, 6),
    ("prefill", {0: 1, 1: 2}), ("draft", {0: 3, 1: 2}), ("decode", [0, 1, 2], 1),
]  # fmt: skip


@pytest.mark.parametrize("kind", DTYPES)
def test_a_schedule_that_has_everything(package, kind) -> None:
    """The same of one that a reader can follow."""
    engine = Engine(package, VARIANTS[kind], SLOTS, DTYPES[kind], 7)
    run(engine, LONG)
    assert {key: request.done for key, request in engine.requests.items()} == {0: 5, 1: 8, 2: 5}


def test_a_wrong_state_is_found(package) -> None:
    """The check fails where a call leaves another request's state, or touches a slot of nobody."""
    for change in (lambda engine: engine.pool[engine.requests[0].slot].add_(1), lambda engine: engine.pool.zero_()):
        engine = Engine(package, VARIANTS["fp32"], SLOTS, torch.float32, 7)
        run(engine, [])
        change(engine)
        with pytest.raises(AssertionError):
            engine.check()
