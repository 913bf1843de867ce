"""Learning from trials: the shipped rule is what its trials give, and what is left out is left out."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from command_line import document, fails, run
from support import ROOT

from m2gen.bucket import bucket_of
from m2gen.db import Failure, Reason
from m2gen.errors import TuneError
from m2gen.schedule import parse
from m2gen.schedule.learned import FILE, leaf
from m2gen.schedule.recipes import Recipe
from m2gen.tune.learn import fit, judged, left_out, rules_of, text_of
from m2gen.tune.ledger import open_ledger
from m2gen.tune.lessons import UNKNOWN, Lesson, read, written
from m2gen.tune.study import encode_trial
from m2gen.tune.trial import Samples, Trial

TRIALS = ROOT / "docs" / "data" / "trials.jsonl"
HEADER = {
    "variant": "k64_v16_q1_k1_v132_f132_w132_bf16_carry_approx",
    "batch": 4,
    "seq": 4096,
    "objective": "train",
    "arch": "sm_90",
    "device": "NVIDIA H200",
    "sm_count": 132,
    "study": "x",
}
SLUGS = tuple(f"mma_f{f}_b{b}c8atx_i8_ptx" for f, b in (("64x2u8a", "64x2"), ("32x1u8a", "64x4"), ("16x1u8a", "64x4")))


@pytest.fixture(scope="module")
def lessons() -> tuple[Lesson, ...]:
    """Return the lessons of the shipped trials."""
    return read([TRIALS])


def _trials() -> list[Trial]:
    """Return four trials that passed and one that failed."""
    trials = [
        Trial(parse(slug), "panel", samples=Samples((1.0 + i,) * 3, (4.0 - i,) * 3, 0)) for i, slug in enumerate(SLUGS)
    ]
    trials.append(Trial(parse("mma_f64x4u8a_b64x4c8atx_i8_ptx"), "panel", samples=Samples((9.0,), (9.0,), 0)))
    wrong = Failure(Reason.WRONG, "y of plain")
    slug = "mma_f32x2u8a_b64x2c8atx_i8_ptx"
    return [*trials, Trial(parse(slug), "panel", samples=Samples((0.1,), (0.1,), 0), failure=wrong)]


def journal(path: Path, **header: object) -> Path:
    """Write the journal of a search, and return its path."""
    with closing(open_ledger(path, {**HEADER, **header}, "host:0")) as ledger:
        for trial in _trials():
            ledger.record(trial)
    return path


def old_journal(path: Path, **header: object) -> Path:
    """Write a journal as m2gen 0.2.0 did."""
    lines = [{"search": {**HEADER, **header}}, *({"trial": encode_trial(trial)} for trial in _trials())]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_the_shipped_rule_is_that_of_the_shipped_trials(lessons: tuple[Lesson, ...]) -> None:
    """Byte for byte, and the trials are as they would be written again."""
    assert text_of(rules_of(lessons)) == FILE.read_text(encoding="utf-8")
    assert written(lessons) == TRIALS.read_text(encoding="utf-8")


def test_the_order_of_lessons_does_not_matter(lessons: tuple[Lesson, ...], tmp_path: Path) -> None:
    """Files may come in any order, and a workload may be in several."""
    parts = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for part, some in zip(parts, (lessons[::2], lessons[1::2]), strict=True):
        part.write_text(written(some), encoding="utf-8")
    assert read(reversed(parts)) == read([*parts, TRIALS]) == lessons


def test_what_is_left_out_teaches_nothing(lessons: tuple[Lesson, ...]) -> None:
    """The choice for a workload is the same however fast its own variant's trials are."""
    lesson = next(each for each in lessons if each.at.variant.key == HEADER["variant"])
    others = [each for each in lessons if each.at.variant != lesson.at.variant]
    assert left_out(lessons, lesson) == left_out([*others, lesson], lesson) == left_out(others, lesson)


def test_archs_do_not_learn_from_each_other(lessons: tuple[Lesson, ...], tmp_path: Path) -> None:
    """What is fast on one arch says nothing about another, whose rule is judged by its own trials alone."""
    another = read([journal(tmp_path / "a.log", arch="sm_100", device="NVIDIA B200")])
    both = [*lessons, *another]
    assert rules_of(both)["sm_90"] == rules_of(lessons)["sm_90"]
    assert judged(both) == [*judged(lessons), *judged(another)]
    assert left_out(both, another[0]) is None


def test_the_shortest_time_counts(tmp_path: Path) -> None:
    """A schedule may be in several files, which may come in any order; in one file its last trial counts."""
    slow, fast, failed = (journal(tmp_path / f"{name}.log") for name in ("slow", "fast", "failed"))
    again = Trial(parse(SLUGS[0]), "panel", samples=Samples((0.5,), (0.5,), 0))
    wrong = Trial(parse(SLUGS[0]), "panel", failure=Failure(Reason.WRONG, "dq of packed"))
    for path, trial in ((fast, again), (failed, wrong)):
        with closing(open_ledger(path, HEADER, "host:0")) as ledger:
            ledger.record(trial)
    (lesson,) = read([slow, fast])
    assert read([fast, slow]) == (lesson,)
    assert lesson.ms(parse(SLUGS[0])) == 1.0
    assert read([failed]) == (), "three trials are left"


def test_times_have_as_many_digits_as_a_file_of_them(tmp_path: Path) -> None:
    """Lessons of a journal are those of the file that is written of them: medians to a hundredth of a microsecond."""
    path = journal(tmp_path / "a.log")
    fine = Trial(parse(SLUGS[0]), "panel", samples=Samples((1.2345678, 9.0, 0.5), (2.7182818,) * 3, 0))
    with closing(open_ledger(path, HEADER, "host:0")) as ledger:
        ledger.record(fine)
    (lesson,) = read([path])
    assert lesson.ms(parse(SLUGS[0])) == 1.23457 + 2.71828
    (tmp_path / "b.jsonl").write_text(written([lesson]), encoding="utf-8")
    assert read([tmp_path / "b.jsonl"]) == (lesson,)


def compact(path: Path, timed: list[tuple[str, float, float]], **header: object) -> Path:
    """Write a compact file of one workload, and return its path."""
    where = {name: value for name, value in {**HEADER, **header}.items() if name not in ("study", "objective")}
    lines = [{"workload": where}, *({"timed": each} for each in timed)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_lesson_is_of_as_many_multiprocessors_as_its_gpu_had(tmp_path: Path) -> None:
    """Half of them have twice the programs each, which is another bucket, and a workload of its own."""
    timed = [(slug, 1.0 + i, 2.0) for i, slug in enumerate(SLUGS)] + [("portable_f16x1u4a_b16x1c2a_i16_ptx", 5.0, 5.0)]
    paths = [compact(tmp_path / f"{count}.jsonl", timed, sm_count=count) for count in (132, 66)]
    found = read(paths)
    assert {lesson.at.device.sm_count: lesson.trials == found[0].trials for lesson in found} == {132: True, 66: True}
    heads = found[0].at.variant.total_heads
    for lesson in found:
        assert lesson.at.bucket is bucket_of(lesson.at.batch, heads, lesson.at.device.sm_count)
    assert found[0].at.bucket is not found[1].at.bucket


def test_schedules_that_are_not_valid_teach_nothing(tmp_path: Path) -> None:
    """Those of a file that was edited, or of an m2gen that had other rules: no recipe could be as fast as they are."""
    timed = [(slug, 1.0 + i, 2.0) for i, slug in enumerate(SLUGS)] + [("portable_f16x1u4a_b16x1c2a_i16_ptx", 5.0, 5.0)]
    wrong = [(slug, 0.1, 0.1) for slug in ("mma_f32x0u8p_b32x0c2as_i32_ptx", "portable_f0x1u8p_b16x1c0p_i0_ptx")]
    (lesson,) = read([compact(tmp_path / "right.jsonl", timed)])
    assert read([compact(tmp_path / "both.jsonl", wrong + timed)]) == (lesson,)


def test_trials_from_before_a_clamp_are_those_of_the_schedule_with_it(tmp_path: Path) -> None:
    """In one file or in two, in either order: of both times the shorter counts, and the name is that of today."""
    before = [slug.replace("x_i8", "_i8") for slug in SLUGS]
    assert not {*before} & {*SLUGS}
    old = compact(tmp_path / "old.jsonl", [(before[0], 1.0, 4.0), (before[1], 1.0, 1.5), (before[2], 3.0, 3.0)])
    new = compact(tmp_path / "new.jsonl", [(SLUGS[0], 1.0, 3.5), (SLUGS[1], 1.0, 2.0)])
    other = compact(tmp_path / "other.jsonl", [("portable_f16x1u4a_b16x1c2a_i16_ptx", 5.0, 5.0)])
    both = tmp_path / "both.jsonl"
    both.write_text(new.read_text(encoding="utf-8") + old.read_text(encoding="utf-8"), encoding="utf-8")
    (lesson,) = read([old, new, other])
    assert read([other, new, old]) == read([both, other]) == (lesson,)
    expected = {SLUGS[0]: (1.0, 3.5), SLUGS[1]: (1.0, 1.5), SLUGS[2]: (3.0, 3.0)}
    expected["portable_f16x1u4a_b16x1c2a_i16_ptx"] = (5.0, 5.0)
    assert {t.schedule.slug: (t.forward_ms, t.backward_ms) for t in lesson.trials} == expected
    (tmp_path / "again.jsonl").write_text(written([lesson]), encoding="utf-8")
    assert read([tmp_path / "again.jsonl"]) == (lesson,)


def test_trials_of_a_gpu_without_the_clamp_keep_their_names(tmp_path: Path) -> None:
    """Its schedules have never had it, and their recipes have none there."""
    slugs = [slug.replace("x_i8", "_i8") for slug in SLUGS] + ["mma_f32x1u8a_b32x1c2as_i16_ptx"]
    where = {"arch": "sm_80", "device": "NVIDIA A100-SXM4-80GB", "sm_count": 108}
    timed = [(slug, 1.0 + i, 2.0) for i, slug in enumerate(slugs)]
    (lesson,) = read([compact(tmp_path / "a.jsonl", timed, **where)])
    assert {t.schedule.slug for t in lesson.trials} == {*slugs}
    assert lesson.cost(Recipe.of(parse(SLUGS[0]), lesson.at.variant)) == 0.0


def test_most_workloads_are_close_without_their_trials(lessons: tuple[Lesson, ...]) -> None:
    """At least 18 of 25 are within 10 % of their best, and all are with their own trials: the page says so."""
    found = judged(lessons)
    close = sum(each.without is not None and each.without <= 1.1 for each in found)
    assert (close, len(found)) >= (18, 25)
    assert all(each.rule is not None and each.rule <= 1.1 for each in found)
    page = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    for each in found:
        times = ("not timed" if ms is None else f"{ms:.3f}" for ms in (each.families, each.rule, each.without))
        assert f" | {each.lesson.best_ms:.3f} | {' | '.join(times)} |" in page
    assert f"{close} of {len(found)} are within 10 % of the best" in page


def test_parts_of_two_trials_are_a_time(tmp_path: Path) -> None:
    """A forward and a backward that were timed in two trials add up; failures and unknown parts have no time."""
    (lesson,) = read([journal(tmp_path / "a.log")])
    assert len(lesson.trials) == 4
    assert lesson.ms(parse("mma_f64x2u8a_b64x4c8atx_i8_ptx")) == lesson.best_ms == 1.0 + 2.0
    assert lesson.ms(parse("mma_f32x2u8a_b64x2c8atx_i8_ptx")) is None
    unknown = Recipe.of(parse("mma_f32x2u8a_b64x2c8atx_i8_ptx"), lesson.at.variant)
    assert lesson.cost(unknown) == UNKNOWN
    fits_none = Recipe.of(parse("wgmma_aa_i8_ptx"), lesson.at.variant)
    assert lesson.cost(fits_none) is None


def test_parts_of_two_intervals_are_no_time(tmp_path: Path) -> None:
    """A backward reads the states that a forward of its own interval saves, so neither was timed for the other."""
    one, other = "portable_f16x1u4a_b16x1c2a", "portable_f32x1u4a_b32x1c2a"
    timed = [(f"{one}_i16_ptx", 1.0, 9.0), (f"{other}_i32_ptx", 9.0, 1.0)]
    timed += [(f"{one}_i64_ptx", 8.0, 8.0), (f"{other}_i64_ptx", 8.0, 8.0)]
    (lesson,) = read([compact(tmp_path / "a.jsonl", timed)])
    assert lesson.best_ms == 10.0
    assert lesson.ms(parse("portable_f16x1u4a_b32x1c2a_i16_ptx")) is None
    assert lesson.ms(parse("portable_f16x1u4a_b32x1c2a_i64_ptx")) == 16.0


def test_a_forward_with_slots_is_timed_beside_its_tile_alone(tmp_path: Path) -> None:
    """Forwards of any tile are a pair with a backward of slots, but those with slots have its rows and warps."""
    timed = [("mma_f64x2u8at_b64x2c8atx_i8_ptx", 1.0, 5.0), ("mma_f32x1u8a_b64x4c8atx_i8_ptx", 3.0, 2.0)]
    timed += [("mma_f16x1u8a_b64x4c8atx_i8_ptx", 3.5, 2.0), ("mma_f64x2u8a_b64x2c8atx_i8_ptx", 3.0, 5.0)]
    (lesson,) = read([compact(tmp_path / "a.jsonl", timed)])
    assert lesson.best_ms == 3.0 + 2.0


def test_a_leaf_has_the_fastest_trial(tmp_path: Path) -> None:
    """The rule of one workload is the fastest of its trials."""
    (lesson,) = found = read([journal(tmp_path / "a.log")])
    tree = fit(found)["slots"]
    (recipe,) = map(Recipe.read, tree["recipes"])
    assert lesson.ms(recipe.at(lesson.at.variant, lesson.at.device)) == min(trial.ms for trial in lesson.trials)


def test_of_recipes_as_good_a_leaf_has_the_one_that_most_know(tmp_path: Path) -> None:
    """What one workload was timed with alone must be better by more than 3 %."""
    for gain, expected in ((0.02, SLUGS[0]), (0.04, SLUGS[1])):
        slow = [(SLUGS[2], 3.0, 3.0), ("mma_f64x4u8a_b64x4c8atx_i8_ptx", 4.0, 4.0)]
        alone = [(SLUGS[0], 1.0, 3.0), (SLUGS[1], 1.0, 3.0 - 4.0 * gain), *slow]
        other = [(SLUGS[0], 1.0, 3.0), *slow, ("mma_f64x1u8a_b64x4c8atx_i8_ptx", 0.5, 0.5)]
        far = {"variant": HEADER["variant"].replace("132", "84"), "batch": 8}
        paths = [compact(tmp_path / "a.jsonl", alone), compact(tmp_path / "b.jsonl", other, **far)]
        first = next(lesson for lesson in read(paths) if lesson.at.batch == 4)
        tree = fit(read(paths))["slots"]
        recipe = Recipe.read(leaf(tree, first.at.having)["recipes"][0])
        assert recipe.at(first.at.variant, first.at.device).slug == expected


def splits(tree: dict[str, Any]) -> int:
    """Return how many splits a tree has."""
    return 1 + splits(tree["yes"]) + splits(tree["no"]) if "feature" in tree else 0


def wanting(folder: Path, wants: dict[int, str], times: dict[str, tuple[float, float]]) -> tuple[Lesson, ...]:
    """Return lessons of a layer with 66 heads, each batch of a bucket, that want the recipes named in ``wants``."""
    variant = HEADER["variant"].replace("132", "66")
    rest = [(SLUGS[2], 9.0, 9.0), ("mma_f64x4u8a_b64x4c8atx_i8_ptx", 9.0, 9.0)]
    paths = []
    for batch, want in wants.items():
        timed = [(slug, ms, ms) for slug, ms in zip(SLUGS, times[want], strict=False)]
        paths.append(compact(folder / f"{batch}.jsonl", timed + rest, variant=variant, batch=batch))
    return read(paths)


def test_the_tree_is_the_cheapest(tmp_path: Path) -> None:
    """Few and many programs want one recipe, those in between another: splitting where most is saved costs more."""
    wants = dict(zip((1, 2, 4, 8, 16, 20), "AABBAA", strict=True))
    lessons = wanting(tmp_path, wants, {"A": (1.0, 2.0), "B": (2.0, 1.0)})
    assert len({lesson.at.bucket for lesson in lessons}) == len(wants)
    tree = fit(lessons)["slots"]
    assert splits(tree) == 2
    for lesson in lessons:
        recipe = Recipe.read(leaf(tree, lesson.at.having)["recipes"][0])
        assert lesson.cost(recipe) == pytest.approx(0.0), lesson.at.name


def test_a_threshold_lies_in_the_widest_gap(tmp_path: Path) -> None:
    """Where two splits serve what was timed alike, what either side may have goes with its nearer neighbour."""
    times = {"A": (1.0, 2.0), "B": (2.0, 1.0), "either": (1.0, 1.0)}
    for folder, wants in (("low", {1: "A", 2: "either", 20: "B"}), ("high", {1: "A", 8: "either", 20: "B"})):
        (tmp_path / folder).mkdir()
        lessons = wanting(tmp_path / folder, wants, times)
        first, middle, last = (leaf(fit(lessons)["slots"], lesson.at.having) for lesson in by_batch(lessons))
        assert first != last
        assert middle == (first if folder == "low" else last)


def by_batch(lessons: tuple[Lesson, ...]) -> list[Lesson]:
    """Return lessons, that of fewest sequences first."""
    return sorted(lessons, key=lambda lesson: lesson.at.batch)


def test_leaves_that_serve_all_well_are_not_split(tmp_path: Path) -> None:
    """Not even where what all of them lose together is more than a split costs."""
    wants = dict(zip((1, 2, 4, 8, 16, 20), "AAABBB", strict=True))
    assert splits(fit(wanting(tmp_path, wants, {"A": (1.0, 1.025), "B": (1.025, 1.0)}))["slots"]) == 0


def test_searches_for_inference_are_no_lessons(tmp_path: Path) -> None:
    """Their schedules were not made for training."""
    assert read([journal(tmp_path / "a.log", objective="infer")]) == ()


WORKLOAD = json.dumps({"workload": {name: value for name, value in HEADER.items() if name != "study"}})
NO_JOURNALS = {
    "number": ('{"search": 7}', 1),
    "list": ("[]", 1),
    "binary": ("\udcff\udcfe", 1),
    "unknown": ("{}", 1),
    "before": (json.dumps({"timed": [SLUGS[0], 1, 2]}), 1),
    "variant": (WORKLOAD.replace("k64", "x64"), 1),
    "batch": (WORKLOAD.replace(": 4,", ": 0,"), 1),
    "schedule": (f'{WORKLOAD}\n{{"timed": ["fast", 1, 2]}}', 2),
    "negative": (f'{WORKLOAD}\n{{"timed": ["{SLUGS[0]}", -1, 2]}}', 2),
    "infinite": (f'{WORKLOAD}\n{{"timed": ["{SLUGS[0]}", 1, Infinity]}}', 2),
    "short": (f'{WORKLOAD}\n{{"timed": ["{SLUGS[0]}", 1]}}', 2),
}


@pytest.mark.parametrize(("text", "line"), NO_JOURNALS.values(), ids=NO_JOURNALS.keys())
def test_what_is_no_journal_is_refused(tmp_path: Path, text: str, line: int) -> None:
    """The message has the file and the line."""
    (tmp_path / "a.jsonl").write_text(f"{text}\n", encoding="utf-8", errors="surrogateescape")
    with pytest.raises(TuneError, match=rf"a\.jsonl:{line} must be a line of a journal"):
        read([tmp_path / "a.jsonl"])


def test_what_a_killed_search_left_is_read(tmp_path: Path) -> None:
    """A torn last line is no trial, and a candidate that was begun has none; the file stays as it is."""
    path = journal(tmp_path / "a.log")
    (lesson,) = read([path])
    ledger = open_ledger(path, HEADER, "host:0")
    begun = parse("mma_f16x1u8a_b16x1c2a_i8_ptx")
    assert ledger.claim(begun)
    ledger.begin(begun)
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"op_code":8,"worker_id":"w","trial_id":5,"user_attr":{"m2gen":{"sche')
    before = path.read_bytes()
    assert read([path]) == (lesson,)
    assert path.read_bytes() == before


def test_old_journals_are_read(tmp_path: Path) -> None:
    """Those of m2gen 0.2.0 have the same lessons; some do not name their GPU, and teach nothing."""
    path = journal(tmp_path / "a.log")
    old = old_journal(tmp_path / "a.jsonl")
    with old.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"begun": SLUGS[0], "machine": ["host", "boot"]}) + '\n{"trial": {"sche')
    older = tmp_path / "old.jsonl"
    older.write_text(old.read_text(encoding="utf-8").replace('"arch"', '"architecture"'), encoding="utf-8")
    assert read([path]) == read([old]) == read([older, old])


def test_a_journal_that_is_another_s_is_refused(tmp_path: Path) -> None:
    """A journal of Optuna's that is not whole is named."""
    lines = journal(tmp_path / "a.log").read_bytes().split(b"\n")
    (tmp_path / "a.log").write_bytes(b"\n".join([lines[0], b"[7]", *lines[1:]]))
    with pytest.raises(TuneError, match=r"a\.log must be a journal of searches of this m2gen, got TypeError"):
        read([tmp_path / "a.log"])


def test_nothing_is_written_where_nothing_is_learned(tmp_path: Path) -> None:
    """The rule and the trials that are there stay."""
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "must have a workload of which 4 trials" in fails(
        1, "db", "learn", str(empty), "--trials", str(empty), "--rule", str(tmp_path / "rule.json")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


def test_the_command(tmp_path: Path) -> None:
    """It writes the rule and the compact trials, and shows each workload."""
    rule, trials = tmp_path / "rule.json", tmp_path / "trials.jsonl"
    found = run("db", "learn", str(TRIALS), "--rule", str(rule), "--trials", str(trials))
    said = "of 25 are within 10 % of their best; 4 choose what was not timed there; the mean of the others is 1."
    assert said in " ".join(found.stdout.split())
    assert rule.read_bytes() == FILE.read_bytes()
    assert trials.read_bytes() == TRIALS.read_bytes()
    assert len(document("db", "learn", str(TRIALS))) == 25
    assert "must be readable" in fails(2, "db", "learn", str(tmp_path / "none.jsonl"))


def test_workloads_of_two_gpus_are_told_apart(tmp_path: Path) -> None:
    """Rows of one workload name their GPUs; where no choice was timed, none has a mean."""
    paths = [str(journal(tmp_path / "a.log")), str(journal(tmp_path / "b.log", device="NVIDIA H100 80GB HBM3"))]
    text = " ".join(run("db", "learn", *paths).stdout.split())
    assert "B4 S4096, NVIDIA H100 80GB HBM3" in text
    assert "B4 S4096, NVIDIA H200" in text
    assert [(row["arch"], row["device"]) for row in document("db", "learn", *paths)] == [
        ("sm_90", "NVIDIA H100 80GB HBM3"),
        ("sm_90", "NVIDIA H200"),
    ]
    parts = [("16x1", "16x1"), ("16x1", "32x1"), ("32x1", "16x1"), ("32x1", "32x1")]
    timed = [(f"portable_f{f}u4a_b{b}c2a_i16_ptx", 1.0, 2.0) for f, b in parts]
    text = " ".join(run("db", "learn", str(compact(tmp_path / "c.jsonl", timed))).stdout.split())
    assert "NVIDIA" not in text
    assert "0 of 1 are within 10 % of their best; 1 choose what was not timed there" in text
    assert "the mean" not in text
