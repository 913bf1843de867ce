"""Seeds of a search: records of the database in order, and failures that are not tried."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import simulated
from records import H100, H200, SMS, environment, failed, sequences_in, winner
from searches import SPEC, Silent
from support import as_mma, make_schedule, make_variant

from m2gen.bucket import Bucket
from m2gen.db import Database, Failure, Reason, Record, stale
from m2gen.device import TARGETS
from m2gen.kernels.identity import kernel_hash
from m2gen.kernels.lowering import Lowering
from m2gen.pipeline import plan
from m2gen.pipeline.goals import TuneRequest
from m2gen.pipeline.tune import tune
from m2gen.schedule import default, parse, problems
from m2gen.spec import Objective
from m2gen.tune.log import Outcome
from m2gen.tune.memory import USUAL, MemoryBound
from m2gen.tune.records import NEIGHBOURS, known_failures, records_of, seeds
from m2gen.tune.space import Subject, fits
from m2gen.tune.trial import Trial
from m2gen.variant import parse_variant

VARIANT = make_variant(64, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx")
OTHER_HEADS = make_variant(64, 16, (1, 1, 8, 8, 8), "bf16", tanh="approx")
OTHER_DIMS = make_variant(32, 16, (1, 1, 4, 4, 4), "bf16", tanh="approx")
DEVICE = replace(TARGETS["sm_90"], name=H200, sm_count=SMS)
BATCH = sequences_in(Bucket.FOUR, VARIANT.total_heads)
SUBJECT = Subject(VARIANT, DEVICE, Objective.TRAIN, BATCH, 4096, MemoryBound())
BASE = default(VARIANT, DEVICE)
A100 = replace(TARGETS["sm_80"], name="NVIDIA A100-SXM4-80GB")
HERE, ELSEWHERE = environment(), environment("NVIDIA A100-SXM4-80GB", "sm_80")
FIRST, SECOND, THIRD, FOURTH, FIFTH, SIXTH = (make_schedule(interval=4 * n) for n in range(1, 7))


def outdated(record: Record) -> Record:
    """Return the record as if it were of kernels that are rendered otherwise now."""
    found = replace(record, provenance=replace(record.provenance, kernel="0" * 12))
    assert stale(found)
    return found


def named(subject: Subject, *records: Record) -> list[tuple[str, str]]:
    """Return the seeds from these records as slugs and origins, whatever order they come in."""
    found = seeds(subject, HERE, records)
    assert found == seeds(subject, HERE, records[::-1])
    return [(schedule.slug, origin) for schedule, origin in found]


def test_seeds_come_nearest_first() -> None:
    """The default, the record of key and GPU, then of the arch by variant and bucket, then those of other arches."""
    records = (
        winner(variant=VARIANT, schedule=SIXTH, where=ELSEWHERE),
        winner(variant=OTHER_HEADS, schedule=FIFTH),
        winner(Bucket.HALF, variant=VARIANT, schedule=FOURTH),
        winner(Bucket.TWO, variant=VARIANT, schedule=THIRD),
        winner(variant=VARIANT, schedule=SECOND, where=environment(H100)),
        winner(variant=VARIANT, schedule=FIRST),
    )
    assert named(SUBJECT, *records) == [
        (BASE.slug, "default"),
        (FIRST.slug, "record"),
        (SECOND.slug, "similar"),
        (THIRD.slug, "similar"),
        (FOURTH.slug, "similar"),
        (FIFTH.slug, "similar"),
        (SIXTH.slug, "elsewhere"),
    ]


def test_what_is_no_seed() -> None:
    """Records of other dims, of another objective and of failures; a schedule that is there already stays in place."""
    infer = winner(variant=VARIANT, schedule=SECOND)
    records = (
        winner(variant=OTHER_DIMS, schedule=FIRST),
        replace(infer, key=replace(infer.key, objective=Objective.INFER)),
        failed(variant=VARIANT, schedule=THIRD),
        winner(variant=VARIANT, schedule=BASE.on(A100), where=ELSEWHERE),
    )
    assert named(SUBJECT, *records) == [(BASE.slug, "default")]


def test_seeds_have_what_the_gpu_decides() -> None:
    """A clamp of two instructions is one where the GPU has that, and one of one is two where it has not."""
    schedule = parse("mma_f64x2u8at_b64x2c8atx_i8_ptx")
    for device, elsewhere in ((DEVICE, A100), (A100, DEVICE)):
        there = schedule.on(elsewhere)
        assert problems(VARIANT, there, device) or there != schedule.on(device)
        record = winner(variant=VARIANT, schedule=there, where=environment(elsewhere.name, elsewhere.arch))
        found = [one for one, origin in seeds(replace(SUBJECT, device=device), HERE, [record]) if origin != "default"]
        assert found == [schedule.on(device)]


def test_few_similar_records_are_seeds() -> None:
    """If there are too many, only the nearest are seeds, and invalid ones do not count."""
    many = [winner(variant=OTHER_HEADS, schedule=make_schedule(interval=4 * n), high=n / 100) for n in range(1, 12)]
    wide = replace(FIRST, forward=replace(FIRST.forward, rows=128))
    assert problems(VARIANT, wide, DEVICE)
    invalid = replace(winner(Bucket.FOUR, variant=VARIANT, schedule=FIRST), schedule=wide)
    expected = [(record.schedule.slug, "similar") for record in many[:NEIGHBOURS]]
    assert named(SUBJECT, invalid, *many) == [(BASE.slug, "default"), *expected]


def test_few_records_of_other_gpus_are_seeds() -> None:
    """Winners of other GPUs are as few as similar ones, the fastest of the nearest first."""
    of_schedules = [(make_schedule(interval=4 * n), n / 100) for n in range(1, 12)]
    many = [winner(variant=VARIANT, schedule=each, high=high, where=ELSEWHERE) for each, high in of_schedules]
    expected = [(record.schedule.slug, "elsewhere") for record in many[:NEIGHBOURS]]
    assert named(SUBJECT, *many) == [(BASE.slug, "default"), *expected]


def test_a_stale_record_is_a_seed_where_its_schedule_is_valid() -> None:
    """After a fresh one of the same key; not where the predicate refuses its schedule, or the memory bound does."""
    fresh, old = winner(variant=VARIANT, schedule=FIRST, high=0.9), winner(variant=VARIANT, schedule=SECOND, high=0.1)
    assert named(SUBJECT, outdated(old), fresh)[1:] == [(FIRST.slug, "record"), (SECOND.slug, "record")]
    odd = replace(SECOND, interval=SECOND.forward.unroll + 1)
    mma = as_mma(SECOND)
    for variant, schedule in ((VARIANT, odd), (make_variant(64, 16, (1, 1, 4, 4, 4), "fp32"), mma)):
        subject = replace(SUBJECT, variant=variant)
        assert problems(variant, schedule, DEVICE)
        refused = outdated(replace(winner(variant=variant, schedule=SECOND), schedule=schedule))
        assert [origin for _, origin in named(subject, refused)] == ["default"]
    bounded = replace(SUBJECT, memory=USUAL)
    assert not fits(bounded, FIRST)
    assert [origin for _, origin in named(bounded, outdated(fresh))] == ["default"]


def test_failures_of_these_kernels_on_this_gpu_are_known() -> None:
    """Not those of another GPU, another Triton, another variant, or of kernels that are rendered otherwise now."""
    known = failed(Reason.WRONG, variant=VARIANT, schedule=FIRST)
    others = (
        failed(variant=VARIANT, schedule=SECOND, where=environment(H100)),
        failed(variant=VARIANT, schedule=THIRD, where=environment(triton="3.7.1")),
        failed(variant=OTHER_HEADS, schedule=FOURTH),
        outdated(failed(variant=VARIANT, schedule=FIFTH)),
        winner(variant=VARIANT, schedule=SIXTH),
    )
    (trial,) = known_failures(SUBJECT, HERE, (*others, known))
    assert (trial.schedule, trial.failure, trial.origin) == (FIRST, known.failure, "known")


def test_running_out_of_memory_is_no_lasting_failure() -> None:
    """Only what a schedule does on every problem is recorded, of schedules that no record is of yet."""
    failures = [Failure(reason, "said") for reason in Reason]
    trials = [Trial(make_schedule(interval=4 * n), "search", failure=each) for n, each in enumerate(failures, 1)]
    known = Trial(BASE, "known", failure=Failure(Reason.HANG, "said"))
    outcome = Outcome(SUBJECT, BASE, (*trials, known, Trial(BASE, "default")), {}, None, 0, 0.0, 0.0)
    records = records_of(outcome, simulated.context(), 0, "study")
    found = sorted(record.failure.reason for record in records if record.failure)
    assert found == sorted([Reason.HANG, Reason.CRASH, Reason.WRONG, Reason.LAUNCH])


def test_a_record_that_fails_now_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that seeds a search is tried as anything is: what becomes of it is recorded, so that it serves no more."""
    spec = simulated.place(tmp_path, monkeypatch, SPEC)
    schedule = parse("portable_f32x1u8a_b32x1c2a_i64_ptx")
    variant = parse_variant("k64_v16_q1_k1_v84_f84_w84_fp16_carry_approx")
    simulated.script(tmp_path / "script.json", ms={schedule.slug: 1.0}, wrong=[schedule.slug])
    database = Database(tmp_path / "db")
    database.add([winner(Bucket.EIGHT, variant=variant, schedule=schedule, where=simulated.ENVIRONMENT)])
    request = TuneRequest(database, seconds=60, trials=4)
    (tuned,) = tune(plan(str(spec)), request, simulated.context(compilers=1), Silent())
    (trial,) = (trial for trial in tuned.outcome.trials if trial.schedule == schedule)
    assert trial.origin == "record"
    (failure,) = (record for record in tuned.records if record.failure is not None)
    assert (failure.schedule, failure.failure) == (schedule, trial.failure)


def test_a_search_begins_with_a_stale_record_and_replaces_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the second trial, wins as it did before, and its new record is of the kernels that are rendered now."""
    spec = simulated.place(tmp_path, monkeypatch, SPEC)
    schedule = parse("portable_f32x1u8a_b32x1c2a_i64_ptx")
    variant = parse_variant("k64_v16_q1_k1_v84_f84_w84_fp16_carry_approx")
    simulated.script(tmp_path / "script.json", ms={schedule.slug: 1.0})
    database = Database(tmp_path / "db")
    database.add([outdated(winner(Bucket.EIGHT, variant=variant, schedule=schedule, where=simulated.ENVIRONMENT))])
    request = TuneRequest(database, seconds=60, trials=4)
    (tuned,) = tune(plan(str(spec)), request, simulated.context(compilers=1), Silent())
    assert [trial.origin for trial in tuned.outcome.trials[:2]] == ["default", "record"]
    (record,) = tuned.records
    assert record.schedule == schedule
    assert record.provenance.kernel == kernel_hash(Lowering(variant, schedule))
