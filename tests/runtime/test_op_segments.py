"""Scans in several segments have the bits of one, whatever the lengths, in the order in which programs begin."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from calls import arguments, assert_same, differentiate, operators_of
from support import build_package, import_package, make_schedule, make_variant
from torch import Tensor

from m2gen.problem import Problem, make_inputs
from m2gen.schedule import Schedule
from m2gen.schedule.knobs import SHORTEST_SEGMENT
from m2gen.variant import Variant

SEGMENTS = 3
VARIANTS = {
    "shared_q_k": make_variant(24, 9, (1, 1, 1, 1, 1)),  # two programs share the rows
    "softplus": make_variant(9, 9, (1, 1, 2, 1, 2), gate="softplus"),
}
SCHEDULE = make_schedule("atomic", interval=8)
PROBLEMS = {
    "padded": Problem(1, 2 * SHORTEST_SEGMENT + 11, initial_state=True),
    "packed": Problem(0, 0, lengths=(0, 2 * SHORTEST_SEGMENT + 130, 1), initial_state=True),
}
TAKEN = {"padded": [3], "packed": [1, 3, 1]}
"""Segments of each sequence, none of which but the last is shorter than the shortest; an empty one has one."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[int, ModuleType]:
    """Return packages with scans in one segment and in several."""

    def package(schedule: Schedule) -> ModuleType:
        folder = tmp_path_factory.mktemp(f"segments_{schedule.segments}")
        return import_package(folder, build_package(folder.name, VARIANTS.values(), schedule))

    return {count: package(replace(SCHEDULE, segments=count)) for count in (1, SEGMENTS)}


@pytest.fixture
def tickets(packages, monkeypatch) -> list[Tensor]:
    """Return what the kernels of the package with segments are handed to tell each other of."""
    seen: list[Tensor] = []
    launchers = operators_of(packages[SEGMENTS]).launches.launchers
    made = launchers.tickets_of

    def kept(*arguments):
        seen.append(made(*arguments))
        return seen[-1]

    monkeypatch.setattr(launchers, "tickets_of", kept)
    return seen


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_segments_have_the_bits_of_one(packages, tickets, device, name, variant: Variant) -> None:
    """y, states and every gradient agree; every program has begun, and every segment of every scan has ended."""
    inputs = make_inputs(variant, PROBLEMS[name], seed=4).to(device)
    whole, cut = (packages[count].m2rnn for count in (1, SEGMENTS))
    expected = differentiate(whole, inputs, deterministic=True)
    assert not tickets
    assert_same(differentiate(cut, inputs, deterministic=True), expected)
    programs = variant.total_heads * SCHEDULE.backward.parts(variant)
    every = [count for count in TAKEN[name] for _ in range(programs)]
    assert [x.tolist() for x in tickets] == [[SEGMENTS * len(every), *every]] * 2


def test_short_calls_have_one(packages, tickets, device) -> None:
    """Up to the shortest segment's steps no program waits for another one."""
    variant = VARIANTS["softplus"]
    inputs = make_inputs(variant, Problem(1, 5), seed=4).to(device)
    expected = differentiate(packages[1].m2rnn, inputs, deterministic=True)
    assert_same(differentiate(packages[SEGMENTS].m2rnn, inputs, deterministic=True), expected)
    assert tickets == [None, None]


def test_packed_sequences_have_one_unless_they_are_long(packages, tickets, device) -> None:
    """The mean of a packed batch decides, so a long sequence among short ones has one segment, too."""
    variant = VARIANTS["softplus"]
    lengths = (1, 0, SHORTEST_SEGMENT + 3, 2)
    inputs = make_inputs(variant, Problem(0, 0, lengths=lengths, initial_state=True), seed=4).to(device)
    expected = differentiate(packages[1].m2rnn, inputs, deterministic=True)
    assert_same(differentiate(packages[SEGMENTS].m2rnn, inputs, deterministic=True), expected)
    assert tickets == [None, None]


CALLS = {
    "dense": (2, SHORTEST_SEGMENT + 1, False, True),
    "dense_of_one_segment": (2, SHORTEST_SEGMENT, False, False),
    "dense_and_short": (2 * SHORTEST_SEGMENT, 1, False, False),
    "no_dense_sequence": (0, 2 * SHORTEST_SEGMENT, False, False),
    "one_packed_sequence": (1, SHORTEST_SEGMENT + 1, True, True),
    "packed_above_a_segment": (3, 3 * SHORTEST_SEGMENT + 1, True, True),
    "packed_of_a_segment": (3, 3 * SHORTEST_SEGMENT, True, False),
    "packed_below_a_segment": (3, 3 * SHORTEST_SEGMENT - 1, True, False),
    "packed_and_empty": (3, 0, True, False),
    "no_packed_sequence": (0, 0, True, False),
}


@pytest.mark.parametrize(("batch", "steps", "packed", "expected"), CALLS.values(), ids=CALLS)
def test_which_calls_are_cut(packages, device, batch: int, steps: int, packed: bool, expected: bool) -> None:
    """Those whose sequences, of a packed batch on the mean, are longer than a segment; kernels of one segment never."""
    q = torch.zeros((steps, 1, 1) if packed else (batch, steps, 1, 1), device=device)
    offsets = torch.linspace(0, steps, batch + 1, device=device).long() if packed else None
    for count, package in packages.items():
        launches = operators_of(package).launches
        launchers = launches.launchers
        every = [module for table in launches.dispatch.KERNELS["portable"].values() for module in table]
        assert len(every) == len(VARIANTS)
        for plan in map(launchers.launch_plan.plan_of, every):
            assert launchers.sizes(plan, q, offsets)[:2] == (batch, steps)
            assert launchers.in_segments(plan, batch, steps, offsets) is (expected and count > 1)


def test_no_sequences_have_none(packages, tickets, device) -> None:
    """An empty batch launches nothing."""
    inputs = make_inputs(VARIANTS["softplus"], Problem(0, 2 * SHORTEST_SEGMENT), seed=4).to(device)
    y, state = packages[SEGMENTS].m2rnn(**arguments(inputs))
    assert (y.numel(), state.numel()) == (0, 0)
    assert tickets == [None]
