"""Searches of the kernels around a recurrence on a simulated GPU: goals, spaces, records, and going on after a kill."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import simulated
from command_line import run
from searches import Silent
from simulated import lines

from m2gen import pipeline
from m2gen.db import Database, Reason
from m2gen.errors import ScheduleError, UsageError
from m2gen.pipeline.goals import DECODED, Goal, TuneRequest, goals
from m2gen.pipeline.tune import Tuned, dry_run, header_of, study_name, tune
from m2gen.schedule import parse_any
from m2gen.schedule.layer import (
    DEFAULTS,
    USUAL,
    ConvolveBackwardTiles,
    ConvolveTiles,
    DecodeTiles,
    FinishTiles,
    LayerTiles,
)
from m2gen.schedule.layer_knobs import LayerKernel
from m2gen.schedule.slugs import parse_tiles
from m2gen.schedule.tunable import Tunable, keys_of
from m2gen.spec import Objective
from m2gen.tune.coordinates import labels
from m2gen.tune.kernels import SearchedKernels
from m2gen.tune.lessons import read
from m2gen.tune.space import enumerate_space, space_hash
from m2gen.tune.subject import Subject
from m2gen.variant import parse_variant

SPEC = """schema: 1
name: one
targets: sm_90
layers:
  base:
    head_dim: 16
    state_expansion: 64
    heads: {q: 1, k: 1, v: 84, f: 84, w: 84}
    dtypes: bf16
    gate: [given, softplus]
    workloads: [{batch: 8, seq: 4096}, {batch: 1, seq: 65536}, {batch: 2, seq: 128}]
  few_values:
    head_dim: 16
    state_expansion: 16
    heads: {q: 4, k: 4, v: 1, f: 4, w: 4}
    dtypes: bf16
    workloads: [{batch: 8, seq: 4096}]
"""
VARIANT = parse_variant("k64_v16_q1_k1_v84_f84_w84_bf16_carry_approx")
FINISH = Subject(VARIANT, simulated.DEVICE, Objective.TRAIN, 1, 65536, kernel=LayerKernel.FINISH)


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a spec in an empty working directory, with a cache and a script of its own."""
    return simulated.place(tmp_path, monkeypatch, SPEC)


def asked(spec: Path, kernels: SearchedKernels = SearchedKernels.LAYER, **limits: object) -> list[Goal]:
    """Return the searches of the spec."""
    request = TuneRequest(Database(spec.parent / "db"), kernels=kernels, **limits)  # type: ignore[arg-type]
    return goals(pipeline.plan(str(spec)), request, simulated.DEVICE)


def search(spec: Path, trials: int = 16, watcher: Silent | None = None, **options: object) -> list[Tuned]:
    """Run the searches of the kernels of the spec's first layer."""
    facts = {"layers": ("base",), "seconds": 600.0, "kernels": SearchedKernels.LAYER, **options}
    request = TuneRequest(Database(spec.parent / "db"), trials=trials, **facts)  # type: ignore[arg-type]
    return list(tune(pipeline.plan(str(spec)), request, simulated.context(), watcher or Silent()))


def test_there_is_a_search_for_every_kernel_of_a_variant(spec: Path) -> None:
    """It is of the workload with most tokens; gates that the recurrence computes, and few values, need no kernel."""
    found = asked(spec)
    assert [goal.subject.kernel for goal in found] == list(LayerKernel)
    sizes = {goal.subject.kernel: (goal.subject.batch, goal.subject.seq) for goal in found}
    assert sizes.pop(LayerKernel.DECODE) == (DECODED, 1)
    assert set(sizes.values()) == {(1, 65536)}
    infer = [goal.subject.kernel for goal in asked(spec, objective=Objective.INFER)]
    assert infer == [LayerKernel.CONVOLVE, LayerKernel.DECAY, LayerKernel.FINISH, LayerKernel.DECODE]
    recurrences = asked(spec, SearchedKernels.RECURRENCE)
    assert {goal.subject.kernel for goal in recurrences} == {None}
    assert asked(spec, SearchedKernels.ALL) == recurrences + found
    with pytest.raises(UsageError, match="must have a layer whose v has as many heads as its state"):
        asked(spec, layers=("few_values",))


def test_searches_of_recurrences_keep_their_names(spec: Path) -> None:
    """What a journal of a recurrence is called depends on nothing of the kernels around it."""
    (first, *_) = asked(spec, SearchedKernels.RECURRENCE)
    context = simulated.context()
    assert "kernel" not in header_of(first.subject, context)
    names = {study_name(goal.subject, context) for goal in asked(spec, SearchedKernels.ALL)}
    assert len(names) == len(asked(spec, SearchedKernels.ALL))
    assert len({space_hash(kernel) for kernel in (None, *LayerKernel)}) == 1 + len(LayerKernel)


def test_every_kernel_ends_in_a_record_that_the_next_build_uses(spec: Path) -> None:
    """Winners are faster than defaults beyond noise; the plan of the same spec has their tiles, others the usual."""
    simulated.script(spec.parent / "script.json")
    every = search(spec, trials=24)
    winners = {}
    for tuned in every:
        choice = tuned.outcome.choice
        assert choice is not None
        (record,) = tuned.records
        assert record.schedule == choice.winner
        assert record.timing is not None
        assert record.timing.ratio < 1
        assert (record.timing.backward_ms is None) == (record.schedule.family is not LayerKernel.DECAY)
        winners[record.schedule.family] = record.schedule
    assert set(winners) == set(LayerKernel)
    records = Database(spec.parent / "db").records()
    assert {record.key.variant for record in records} == set(keys_of(VARIANT)[1:])
    planned = pipeline.plan(str(spec), records=records)
    tiles = {choice.device.arch: choice.tiles for choice in planned.choices if choice.variant == VARIANT}
    assert tiles == {"sm_90": LayerTiles.of(winners.values()), "portable": USUAL}
    assert all(choice.record is None for choice in planned.choices)
    others = [choice for choice in planned.choices if choice.variant.state_expansion == 16]
    assert {choice.tiles for choice in others} == {USUAL}


def test_searches_are_deterministic(spec: Path) -> None:
    """Two searches of one seed try the same candidates in the same order."""
    log = simulated.script(spec.parent / "script.json")
    found = []
    for _ in range(2):
        found.append([[t.schedule for t in tuned.outcome.trials] for tuned in search(spec, fresh=True)])
        shutil.rmtree(spec.parent / "db")  # whose records are seeds
        log.unlink()  # by whose length times vary
    assert found[0] == found[1]


def test_a_search_goes_on_where_it_ended(spec: Path) -> None:
    """Trials of the first run are in the journal: the second adds to them, and none is measured twice."""
    log = simulated.script(spec.parent / "script.json")
    few = search(spec, trials=5)
    assert {len(tuned.outcome.trials) for tuned in few} == {5}
    more = search(spec, trials=9)
    assert {len(tuned.outcome.trials) for tuned in more} == {9}
    screened = Counter(line for line in lines(log) if line.startswith("screen"))
    assert set(screened.values()) == {1}
    journals = sorted(path.name.partition("-")[0] for path in (spec.parent / "cache" / "tune").glob("*.log"))
    assert journals == sorted(keys_of(VARIANT)[1:])


def test_a_wrong_candidate_is_never_timed(spec: Path) -> None:
    """It is recorded as a failure of this kernel, is not tried again, and takes no other kernel's record away."""
    wrong = ConvolveTiles(64, 128, 4)
    log = simulated.script(spec.parent / "script.json", wrong=[wrong.slug], ms={wrong.slug: 0.001})
    search(spec)
    assert f"time {wrong.slug}" not in lines(log)
    (failure,) = [record for record in Database(spec.parent / "db").records() if record.failure]
    assert (failure.schedule, failure.failure and failure.failure.reason) == (wrong, Reason.WRONG)
    for path in (spec.parent / "cache" / "tune").iterdir():
        path.unlink()  # so that only the database knows
    before = len(lines(log))
    (again, *_) = search(spec)
    assert f"screen {wrong.slug}" not in lines(log)[before:]
    assert {t.schedule: t.origin for t in again.outcome.trials}[wrong] == "known"
    first = {t.schedule: t.origin for t in again.outcome.trials}
    assert "record" in first.values(), "the winner of before is a seed"


class Unseen:
    """Progress that nobody watches."""

    def start(self, stage: str, total: int) -> None: ...
    def advance(self, item: str) -> None: ...
    def finish(self) -> None: ...


def test_records_are_verified_and_measured_again(spec: Path) -> None:
    """A winner that no longer passes gets a failure, and its kernel the usual tiles; others stay, and are replayed."""
    simulated.script(spec.parent / "script.json")
    search(spec)
    database = Database(spec.parent / "db")
    by_kernel = {record.schedule.family: record for record in database.records()}
    broken = by_kernel[LayerKernel.CONVOLVE]
    simulated.script(spec.parent / "script.json", wrong=[broken.schedule.slug])
    checked = pipeline.verify_records(database, [], simulated.context(), Unseen())
    assert [item.record for item in checked if item.failed] == [broken]
    planned = pipeline.plan(str(spec), records=database.records())
    (choice, *_) = planned.serving(VARIANT, "sm_90")
    assert choice.tiles.convolve == USUAL.convolve
    assert choice.tiles.finish == by_kernel[LayerKernel.FINISH].schedule
    again = pipeline.replay(by_kernel[LayerKernel.DECAY], simulated.context(), Unseen())
    assert again.faster


def test_the_command_asks_for_kernels(spec: Path) -> None:
    """Spaces are named by their kernels; what is none is refused."""
    asked = ("tune", "--spec", str(spec), "--layer", "base", "--dry-run", "--target", "sm_90")
    assert "decode, B64 S1, sm_90" in run(*asked, "--kernels", "layer").stdout
    found = json.loads(run(*asked, "--kernels", "layer", "--json").stdout)
    assert [size["variant"] for size in found] == list(keys_of(VARIANT)[1:])
    assert run(*asked, "--kernels", "none").exit_code == 2


def test_the_rule_for_defaults_learns_nothing_of_tiles(spec: Path) -> None:
    """Journals of both kinds may be given to ``m2gen db learn``."""
    simulated.script(spec.parent / "script.json")
    search(spec, trials=6)
    assert read(sorted((spec.parent / "cache" / "tune").glob("*.log"))) == ()


def test_a_record_beyond_the_axes_is_tried(spec: Path) -> None:
    """Valid tiles of fewer rows than a search proposes, of a record that somebody made: the fewest stand for them."""
    log = simulated.script(spec.parent / "script.json")
    found = [record for tuned in search(spec, trials=4) for record in tuned.records]
    (usual,) = [record for record in found if isinstance(record.schedule, ConvolveTiles)]
    rare = ConvolveTiles(rows=2)
    Database(spec.parent / "db").add([replace(usual, schedule=rare, problem=replace(usual.problem, seq=1))])
    search(spec, trials=8)
    assert f"screen {rare.slug}" in lines(log)
    assert labels(rare)["rows"] == ConvolveTiles.AXES["rows"][0]


def test_dry_run_says_what_would_be_tried(spec: Path) -> None:
    """Spaces are small, the usual tiles are first, and all that follows is one knob from them."""
    request = TuneRequest(Database(spec.parent / "db"), layers=("base",), kernels=SearchedKernels.LAYER)
    sizes = dry_run(pipeline.plan(str(spec)), request, simulated.DEVICE, 4)
    assert [size.goal.subject.kernel for size in sizes] == list(LayerKernel)
    for size in sizes:
        kernel = size.goal.subject.kernel
        assert kernel is not None
        assert size.first[0] == (DEFAULTS[kernel], "default")
        assert {origin for _, origin in size.first[1:]} == {"neighbour"}
        assert size.space.size == len(size.space.points) + sum(size.space.pruned.values())


@pytest.mark.parametrize("kernel", list(LayerKernel))
def test_points_are_valid_and_the_usual_tiles_are_one(kernel: LayerKernel) -> None:
    """Names are read back, and no two points have one."""
    subject = Subject(VARIANT, simulated.DEVICE, Objective.TRAIN, 8, 4096, kernel=kernel)
    points = enumerate_space(subject).points
    assert DEFAULTS[kernel] in points
    assert len({point.slug for point in points}) == len(points)
    for point in points:
        assert parse_any(point.slug) == point
        assert not subject.tunable.problems(point, simulated.DEVICE)


PROBLEMS = {
    "rows must be a power of two, at least 1, got 3": ConvolveTiles(rows=3),
    "rows x cols must be at most 65536, got 131072": ConvolveTiles(1024, 128),
    "warps must be at most 32 on sm_90, got 64": ConvolveTiles(warps=64),
    "unroll must be at most 16 and divide steps = 64, got 3": ConvolveBackwardTiles(unroll=3),
    "block must be a power of two, at least 128, got 64": FinishTiles(block=64),
    "rows must be at least 1, got 0": FinishTiles(rows=0),
    "heads must be at most 64, got 65": DecodeTiles(heads=65),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_is_wrong_with_tiles_is_said(problem: str) -> None:
    """One predicate says so, wherever tiles come from."""
    tiles = PROBLEMS[problem]
    assert Tunable.around(VARIANT, tiles.family).problems(tiles, simulated.DEVICE) == (problem,)


def test_tiles_are_of_one_kernel() -> None:
    """Schedules of recurrences, tiles of another kernel, and layers without such kernels are refused."""
    around, recurrence = Tunable.around(VARIANT, LayerKernel.FINISH), Tunable(VARIANT)
    usual = recurrence.default(simulated.DEVICE)
    assert around.problems(usual, simulated.DEVICE) == (f"family must be finish, got {usual.family}",)
    assert around.problems(DEFAULTS[LayerKernel.DECAY], simulated.DEVICE) == ("family must be finish, got decay",)
    assert recurrence.problems(DEFAULTS[LayerKernel.DECAY], simulated.DEVICE)[0].startswith("family must be portable")
    few = parse_variant("k16_v16_q4_k4_v1_f4_w4_bf16_carry_approx")
    assert Tunable.around(few, LayerKernel.FINISH).problems(DEFAULTS[LayerKernel.FINISH], simulated.DEVICE)
    for wrong in ("finish_r1", "finish_w4_b1024_r1", "finish_r1_b1024_w4_u1", "convolve", "finish_r_b1_w1"):
        with pytest.raises(ScheduleError, match="tiles must begin with their kernel"):
            parse_tiles(wrong)


def test_keys_are_read_back() -> None:
    """A kernel's key has no numerics: layers that differ in them share it."""
    exact = parse_variant("k64_v16_q1_k1_v84_f84_w84_bf16_total_exact_softplus")
    for kernel in LayerKernel:
        tunable = Tunable.around(VARIANT, kernel)
        assert Tunable.parse(tunable.key) == tunable == Tunable.around(exact, kernel)
    assert Tunable.parse(VARIANT.key) == Tunable(VARIANT)
    for wrong in ("finish_k64_v16_q1_k1_v84_f84_w84_bf16_carry_approx", "unknown_k64", "finish_k64", "finish"):
        with pytest.raises(ValueError, match="must"):
            Tunable.parse(wrong)
