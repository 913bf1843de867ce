"""The declared space: complete, valid, and counted; what is proposed from it, and what wins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from itertools import islice, product
from math import prod

import pytest
import simulated
from hypothesis import given, settings
from hypothesis import strategies as st
from support import make_variant

from m2gen.bench.check import _prompt_cases
from m2gen.device import TARGETS
from m2gen.kernels.lowering import Lowering
from m2gen.measure.checks import STEPS, seeded_cases
from m2gen.measure.statistics import NOISE
from m2gen.schedule import (
    FAMILIES,
    Family,
    Mma,
    Reduction,
    Schedule,
    Scratch,
    Tanh,
    Wgmma,
    default,
    defaults,
    parse,
    problems,
)
from m2gen.schedule.knobs import SHORTEST_SEGMENT
from m2gen.schedule.mma_tiles import FORWARD_REGISTERS, MmaForward
from m2gen.spec import Objective
from m2gen.tune.coordinates import AXES, indices, moved, values_of
from m2gen.tune.knobs import importances, study_of
from m2gen.tune.memory import MemoryBound, extra_bytes
from m2gen.tune.sampler import Sampler
from m2gen.tune.search import Proposer, best_combination, neighbours, tiles
from m2gen.tune.select import select
from m2gen.tune.space import CONSTRAINTS, Subject, enumerate_space, fits, space_hash
from m2gen.tune.trial import Samples, Trial
from m2gen.variant import Variant, parse_variant

SMALL = parse_variant("k24_v16_q1_k1_v4_f4_w4_fp16_carry_approx")
LARGE = parse_variant("k64_v16_q1_k1_v132_f132_w132_bf16_carry_approx")
DEVICE = TARGETS["sm_90"]
TRAIN = Subject(SMALL, DEVICE, Objective.TRAIN, 2, 64, MemoryBound())
BASE = default(SMALL, DEVICE)
POINTS = enumerate_space(TRAIN).points


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_familys_axes_are_its_knobs(family: type[Schedule]) -> None:
    """Every field of the schedule and of its parts has an axis, and no axis is about a knob that it lacks."""
    names = [f"{side}.{field.name}" for side, part in family.PARTS.items() for field in fields(part)]
    names += [field.name for field in fields(family) if field.name not in (*family.PARTS, "family")]
    assert sorted(names) == sorted(family.AXES)
    for knob, values in (("tanh", Tanh), ("forward.reduction", Reduction), ("backward.reduction", Reduction)):
        assert set(family.AXES[knob]) == set(values)
    assert {name: set(AXES[name]) >= set(values) for name, values in family.AXES.items()} == dict.fromkeys(names, True)


def _size(subject: Subject) -> int:
    """Return how many points the families' products have."""
    serving = [family for family in FAMILIES if not family.unsupported(subject.variant, subject.device)]
    return sum(prod(map(len, family.axes(subject.variant, subject.device).values())) for family in serving)


def _sampled(every: int) -> Iterator[Schedule]:
    """Return points of the products of all axes of all families, one of ``every``."""
    for family in FAMILIES:
        for values in islice(product(*family.AXES.values()), 0, None, every):
            yield family.of(dict(zip(family.AXES, values, strict=True)))


def test_every_valid_point_is_enumerated_or_counted_with_a_reason() -> None:
    """Against the validity predicate on a sample of the products: no valid point is lost without a reason."""
    space = enumerate_space(TRAIN)
    assert len(space.points) + sum(space.pruned.values()) == space.size == _size(TRAIN) // len(AXES["segments"])
    assert len(set(space.points)) == len(space.points)
    every = set(space.points)
    assert BASE in every
    for schedule in _sampled(37):
        valid = not problems(SMALL, schedule, DEVICE)
        assert valid or schedule not in every
        if valid and schedule not in every:
            warps = max(
                schedule.forward.warps / schedule.forward.rows, schedule.backward.warps / schedule.backward.rows
            )
            alone = Reduction.PARTIAL in (schedule.forward.reduction, schedule.backward.reduction)
            two = schedule.family is Family.MMA and not schedule.backward.xorsign
            assert warps > 2 / 16 or alone or two or schedule.backward.chunk == 8 or schedule.segments > 1


def test_a_sampler_learns_of_axes_with_a_choice() -> None:
    """It is asked for no place on an axis that all points share, and what it says is a point all the same."""
    points = [point for point in POINTS if point.interval == BASE.interval and point.tanh is BASE.tanh]
    proposer = Proposer(points, [(BASE, "default")], Sampler.TPE, 0)
    first = proposer.ask()
    assert first is not None
    proposer.tell(first, _trial(BASE))
    second = proposer.ask()
    assert second is not None
    assert second.schedule in points
    assert second.asked is not None
    constant = {"interval", "tanh", "segments", "forward.slots", "forward.registers"}
    assert set(second.asked.params) == set(AXES) - constant
    other = next(point for point in POINTS if point.interval != BASE.interval)
    proposer.tell(None, _trial(other))  # of another run, beyond these points
    assert proposer.ask() is not None


def test_the_check_cuts_walks() -> None:
    """Its problems are longer than a segment of any interval, so what is timed in segments was verified in segments."""
    shortest = [replace(BASE, interval=interval, segments=3).shortest_segment for interval in AXES["interval"]]
    assert max(shortest) < STEPS
    prompts = _prompt_cases(64)[1]
    for asked in (*seeded_cases(SMALL, STEPS), *seeded_cases(SMALL, STEPS, held_out=True), prompts):
        lengths = asked.case.problem.lengths or (asked.case.problem.seq,)
        assert sum(lengths) > len(lengths) * max(shortest)


def test_segments_are_points_where_programs_take_turns() -> None:
    """Not where the GPU holds all of either kernel's programs at once, and not where they would be short."""

    def cut(subject: Subject) -> set[int]:
        return {p.segments for p in enumerate_space(subject).points if p.family is Family.MMA}

    variant = make_variant(64, 16, (1, 1, 84, 84, 84), "fp16", tanh="approx")  # slots, for bf16, have none
    subject = replace(TRAIN, variant=variant, batch=8, seq=4096, memory=MemoryBound())
    assert cut(subject) == set(AXES["segments"])
    assert enumerate_space(subject).size == _size(subject)
    assert cut(replace(subject, batch=1)) == {1}  # 84 x 4 tiles of 16 rows, where 4 x 132 of two warps run at once
    assert cut(replace(subject, seq=3 * SHORTEST_SEGMENT)) == {1, 3}
    usual = default(variant, DEVICE)
    pair = replace(usual.forward, rows=64, warps=2)
    assert {replace(usual, forward=pair, segments=7), replace(usual, segments=7)} <= set(
        tiles([usual], enumerate_space(subject).points)
    )
    infer = enumerate_space(replace(subject, objective=Objective.INFER)).points
    assert {point.segments for point in infer} == set(AXES["segments"])


def test_inference_has_the_forwards_knobs_only() -> None:
    """Knobs of the backward, which inference never runs, are those of the family's default."""
    space = enumerate_space(replace(TRAIN, objective=Objective.INFER))
    usual = {schedule.family: schedule for schedule in defaults(SMALL, DEVICE)}
    for point in space.points:
        same = usual[point.family]
        assert (point.backward, point.interval) == (same.backward, same.interval)
    assert {point.family for point in space.points} == {Family.PORTABLE, Family.MMA}
    assert len({point.forward for point in space.points}) > 8


def test_warpgroups_are_points_where_they_are_valid() -> None:
    """States of 64 columns on Hopper have every interval that fits and either sum, for training and for inference."""
    variant = make_variant(96, 64, (4, 4, 4, 4, 4), "bf16", tanh="approx")
    subject = replace(TRAIN, variant=variant, memory=MemoryBound())
    found = [point for point in enumerate_space(subject).points if point.family is Family.WGMMA]
    assert {point.interval for point in found} == {2, 4, 8}
    assert (
        {point.forward.reduction for point in found} == {point.backward.reduction for point in found} == set(Reduction)
    )
    usual = Wgmma.default(variant, DEVICE)
    assert usual in found
    assert usual in tiles(defaults(variant, DEVICE), enumerate_space(subject).points)
    inference = enumerate_space(replace(subject, objective=Objective.INFER)).points
    assert {p.interval for p in inference if p.family is Family.WGMMA} == {8}
    assert len(set(inference)) == len(inference)


@pytest.mark.parametrize("bound", [MemoryBound(size=200_000), MemoryBound(times=1.0), MemoryBound(times=1.5)])
def test_memory_bounds_the_space(bound: MemoryBound) -> None:
    """Points over the bound are counted under its name, and what is left fits."""
    subject = replace(TRAIN, memory=bound)
    space = enumerate_space(subject)
    assert space.pruned["memory over --max-memory"] == len(POINTS) - len(space.points) > 0
    assert all(fits(subject, point) for point in space.points)


def test_memory_is_that_of_the_equations() -> None:
    """The 7B layer: every state is 8.9 GB, so a sixteenth of it, and the buffers of the shared gradients."""
    schedule = parse("mma_f32x1u8a_b32x1c2as_i16_ptx")

    def extra(chosen: Schedule) -> int:
        return extra_bytes(Lowering(LARGE, chosen), 4, 4096, training=True)

    assert extra(schedule) == pytest.approx(0.87e9, rel=0.12)  # docs/performance.md
    states = 4 * 4096 * 132 * 64 * 16 * 4
    assert schedule.backward.scratch is Scratch.SHARED
    assert extra(schedule) - extra(replace(schedule, interval=32)) == states // 16 - states // 32
    buffered = replace(schedule, backward=replace(schedule.backward, scratch=Scratch.L2))
    assert extra(buffered) - extra(schedule) == 4 * 132 * 2 * 8 * 32 * 16 * 4
    slots = default(LARGE, DEVICE)  # states of half the bytes, twice as often; one program writes y, dv and df
    assert slots.backward.scratch is Scratch.SLOTS
    assert extra(slots) == pytest.approx(0.563e9, rel=0.01)


def test_forwards_with_slots_are_tried_early_with_either_registers() -> None:
    """As many as ptxas likes, and all that there are: neither is one step of an axis from a forward without slots."""
    subject = Subject(LARGE, DEVICE, Objective.TRAIN, 4, 4096, MemoryBound())
    usual = default(LARGE, DEVICE)
    early = tiles([usual], enumerate_space(subject).points)
    assert {p.forward.registers for p in early if isinstance(p, Mma) and p.forward.slots} == {0, 255}
    none = family_axes(SMALL)
    assert none["forward.slots"] == (False,)
    assert none["forward.registers"] == (0,)


def family_axes(variant: Variant) -> Mapping[str, tuple[object, ...]]:
    """Return the axes of ``mma`` for a variant."""
    return dict(Mma.axes(variant, DEVICE))


@pytest.mark.parametrize(("cols", "warps"), [(24, 2), (64, 4), (100, 8)])
def test_slots_across_columns_are_tried_early(cols: int, warps: int) -> None:
    """A backward whose warps have columns of the same rows, and both kernels so, are points far from any default."""
    variant = make_variant(64, cols, (8, 8, 8, 8, 8), "bf16", tanh="approx")
    subject = Subject(variant, DEVICE, Objective.TRAIN, 4, 1024, MemoryBound())
    points = enumerate_space(subject).points
    for among in (points, tiles(defaults(variant, DEVICE), points)):
        found = [p for p in among if isinstance(p, Mma) and p.backward.scratch is Scratch.SLOTS]
        assert {p.forward.slots for p in found} == {False, True}
        assert {(p.backward.rows, p.backward.warps) for p in found} == {(16, warps)}
        assert {p.forward for p in found if p.forward.slots} >= {MmaForward(16, warps, 8, Reduction.ATOMIC, True)}


def test_slots_are_points_where_they_serve() -> None:
    """One backward, with every forward: bf16 states of at most 16 columns."""
    for variant, serves in ((replace(LARGE, state_expansion=32), True), (SMALL, False)):
        points = enumerate_space(Subject(variant, DEVICE, Objective.TRAIN, 2, 64, MemoryBound())).points
        slots = [point for point in points if point.backward.scratch is Scratch.SLOTS]
        assert bool(slots) is serves
        assert {(p.backward.rows, p.backward.warps, p.backward.chunk, p.interval) for p in slots} <= {
            (32, 1, 8, 8),
            (32, 2, 8, 8),
        }
        assert len({point.forward for point in slots}) > 4 or not serves
        both = {(p.forward, p.backward.warps, p.backward.scratch) for p in points if p.forward.slots}
        tiles = {(f.rows, f.warps, f.unroll, f.warps == warps, scratch) for f, warps, scratch in both}
        assert tiles == ({(32, warps, 8, True, Scratch.SLOTS) for warps in (1, 2)} if serves else set())
        registers = {(p.forward.slots, p.forward.registers) for p in points if isinstance(p, Mma)}
        assert registers == {(False, 0)} | ({(True, most) for most in FORWARD_REGISTERS} if serves else set())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("objective", Objective)
def test_points_clamp_by_as_few_instructions_as_the_gpu_has(arch: str, objective: Objective) -> None:
    """Both ways have the same bits, so there is no choice to search: what is faster is known."""
    device = TARGETS[arch]
    points = enumerate_space(replace(TRAIN, device=device, objective=objective)).points
    mma = [point for point in points if point.family is Family.MMA]
    assert mma
    assert {point.backward.xorsign for point in mma} == {device.has_xorsign}


def test_the_hash_names_the_declaration(monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes with an axis of a family, and with a constraint."""
    before = space_hash()
    assert before == space_hash()
    with monkeypatch.context() as patch:
        patch.setattr("m2gen.tune.space.CONSTRAINTS", CONSTRAINTS[1:])
        assert space_hash() != before
    monkeypatch.setattr(Mma, "AXES", {**Mma.AXES, "interval": (16, 32)})
    assert space_hash() != before


@given(st.sampled_from(POINTS))
def test_slugs_and_values_name_schedules(schedule: Schedule) -> None:
    """Both ways, without loss."""
    assert parse(schedule.slug) == schedule
    assert moved(schedule, {}) == schedule
    assert [AXES[name][place] for name, place in indices(schedule).items()] == list(values_of(schedule).values())


def test_neighbours_are_the_next_points_of_one_axis() -> None:
    """In the space, with none between them."""
    found, every = neighbours(BASE, POINTS), set(POINTS)
    assert len(found) == len(set(found)) > 6
    assert set(found) <= every
    for schedule in found:
        one, other = indices(schedule), indices(BASE)
        (name,) = (name for name in AXES if one[name] != other[name])
        low, high = sorted((one[name], other[name]))
        between = [moved(BASE, {name: value}) for value in AXES[name][low + 1 : high]]
        assert every.isdisjoint(between)
    assert {8, 32} <= {schedule.interval for schedule in found}
    assert BASE.forward.unroll == 8


def test_tiles_change_the_rows_of_both_kernels() -> None:
    """Half, as many and twice, in either family; none but those in the space, and never the default itself."""
    starts = defaults(SMALL, DEVICE)
    assert [start.family for start in starts] == [Family.MMA, Family.PORTABLE]

    def tiled(rows: int, start: Schedule) -> Schedule:
        return moved(start, {"forward.rows": rows, "backward.rows": rows})

    assert tiled(32, starts[0]) == starts[0] == BASE
    wide, narrow = ([tiled(rows, start) for start in starts] for rows in (64, 16))
    points = [*wide, *narrow, *starts, tiled(128, starts[1])]
    assert tiles(starts, points) == [wide[0], narrow[0], wide[1], narrow[1], starts[1]]
    assert tiles(starts, [narrow[1], BASE]) == [narrow[1]]


def _trial(schedule: Schedule, ms: float | None = None) -> Trial:
    forward, backward = simulated.milliseconds(schedule, BASE)
    both = (forward, backward) if ms is None else (ms / 2, ms / 2)
    return Trial(schedule, "search", samples=Samples((both[0],) * 3, (both[1],) * 3, 0))


@pytest.mark.parametrize("sampler", list(Sampler))
def test_every_point_is_proposed_once(sampler: Sampler) -> None:
    """The seeds first and in order, those outside the space too, and then all others."""
    points = list(POINTS[::90])
    outside = replace(BASE, forward=replace(BASE.forward, unroll=16))
    seeds = [(BASE, "default"), (outside, "record"), (points[3], "similar"), (BASE, "elsewhere")]
    proposer = Proposer(points, seeds, sampler, seed=0)
    found = []
    while (proposal := proposer.ask()) is not None:
        found.append(proposal)
        proposer.tell(proposal, _trial(proposal.schedule))
    assert [(p.schedule, p.origin) for p in found[:3]] == seeds[:3]
    assert len(found) == len({p.schedule for p in found})
    assert {p.schedule for p in found} == {*points, BASE, outside}


def test_a_skipped_point_is_not_proposed() -> None:
    """As where another worker has it."""
    proposer = Proposer(POINTS[:3], [(POINTS[0], "default")], Sampler.RANDOM, 0)
    proposer.skip(POINTS[1])
    found = [proposer.ask() for _ in range(3)]
    assert {p.schedule for p in found if p} == {POINTS[0], POINTS[2]}
    assert found[2] is None


def test_parts_are_combined() -> None:
    """The best forward of one trial and the best backward of another are proposed together."""
    trials = [_trial(point) for point in neighbours(BASE, POINTS)] + [_trial(BASE)]
    combined = best_combination(trials, dict.fromkeys(POINTS))
    assert combined is not None
    assert combined not in {trial.schedule for trial in trials}
    best = min(trial.samples.median_ms for trial in trials if trial.samples)
    assert sum(simulated.milliseconds(combined, BASE)) < best
    assert best_combination(trials[:5], dict.fromkeys(POINTS)) is None


def _samples(ms: float, spread: float = 0.002, count: int = 40) -> Samples:
    """Return samples around a time, evenly spread."""
    parts = [1 + spread * (2 * (7 * i % count) / (count - 1) - 1) for i in range(count)]
    return Samples(tuple(ms * part for part in parts), (), 0)


def test_the_fastest_wins_where_it_is_faster() -> None:
    """Beyond noise, by its interval."""
    fast, slow = POINTS[5], POINTS[9]
    choice = select({BASE: _samples(3.0), fast: _samples(2.0), slow: _samples(4.0)}, (BASE, fast, slow), BASE, 0)
    assert choice.winner == fast
    assert choice.ties == (fast,)
    estimate = choice.estimates[fast]
    assert estimate.low_ms <= estimate.median_ms <= estimate.high_ms
    assert estimate.median_ms == pytest.approx(2.0, rel=1e-3)


def test_ties_lean_towards_the_default() -> None:
    """The default itself, or the one that differs from it in the fewest knobs."""
    near = next(point for point in neighbours(BASE, POINTS))
    far = next(
        p for p in POINTS if sum(a != b for a, b in zip(indices(p).values(), indices(BASE).values(), strict=True)) > 5
    )
    tied = {BASE: _samples(2.0), near: _samples(1.998), far: _samples(1.996)}
    assert select(tied, tuple(tied), BASE, 0).winner == BASE
    tied[BASE] = _samples(3.0)
    assert select(tied, tuple(tied), BASE, 0).winner == near
    assert select(tied, (far,), BASE, 0).winner == far, "of those that may win"


@settings(max_examples=40)
@given(st.lists(st.floats(1.0, 5.0), min_size=1, max_size=5), st.floats(0.0, 0.3), st.integers(0, 3))
def test_the_winner_is_never_slower_than_the_default(times: list[float], spread: float, seed: int) -> None:
    """Beyond what counts as noise, whatever the others take."""
    finalists = {BASE: _samples(3.0, spread)}
    finalists |= {point: _samples(ms, spread) for point, ms in zip(POINTS, times, strict=False) if point != BASE}
    choice = select(finalists, tuple(finalists), BASE, seed)
    assert choice.winner == select(finalists, tuple(finalists), BASE, seed).winner
    if choice.winner != BASE:
        assert choice.estimates[choice.winner].median_ms < choice.estimates[BASE].median_ms * (1 + NOISE)
        assert BASE not in choice.ties


def test_importance_finds_the_knob_that_matters() -> None:
    """Where one knob decides everything, it is by far the most important; knobs that do not differ are not listed."""
    chosen = POINTS[:: len(POINTS) // 200]
    found = importances(study_of([_trial(point, 1.0 + (point.tanh is Tanh.EXP)) for point in chosen]))
    assert next(iter(found)) == "tanh"
    assert found["tanh"] > 0.5
    assert sum(found.values()) == pytest.approx(1.0)
    same = [point for point in chosen if point.tanh is Tanh.PTX]
    others = importances(study_of([_trial(point, 1.0 + point.forward.rows) for point in same]))
    assert "tanh" not in others
    assert next(iter(others)) == "forward.rows"
    assert importances(study_of([_trial(point) for point in chosen[:3]])) == {}
    assert importances(study_of([])) == {}


def test_the_usual_bound_leaves_out_what_saves_many_times_the_states() -> None:
    """The 7B layer: a checkpoint every second step is over it; inference holds nothing."""
    train = Subject(LARGE, DEVICE, Objective.TRAIN, 4, 4096)
    base = default(LARGE, DEVICE)
    assert fits(train, base)
    assert not fits(train, replace(base, forward=replace(base.forward, unroll=2), interval=2))
    partial = replace(base.forward, reduction=Reduction.PARTIAL)
    assert fits(replace(train, objective=Objective.INFER), replace(base, forward=partial))
