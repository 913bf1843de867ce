"""Tables on a terminal of 100 columns, of shipped specs, records and runs: nothing is cut, or broken within a word."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from command_line import TINY
from rich.console import Console
from support import ROOT, make_schedule, make_variant
from typer.testing import CliRunner

from m2gen import pipeline
from m2gen.bench.document import Document, load
from m2gen.bucket import BUCKETS, Bucket
from m2gen.cli.app import app
from m2gen.cli.show import bench, build, db, names, sweep, table, tune, verify, watcher
from m2gen.db import Change, Record
from m2gen.device import TARGETS
from m2gen.kernels.resources import Resources
from m2gen.pipeline import CheckRow, Plan, Tuned, TuneRequest, VerifyOutcome
from m2gen.pipeline.goals import Goal
from m2gen.schedule import parse
from m2gen.spec import Objective, TanhMode
from m2gen.tune.log import Outcome, SearchProgress
from m2gen.tune.select import Selection
from m2gen.tune.space import Subject
from m2gen.tune.trial import Samples, Trial
from m2gen.variant import BuiltVariant, Variant, layer_names, parse_variant
from m2gen.verify import CaseReport, TensorResult, cases

SPECS = sorted(path.name for path in (ROOT / "specs").glob("*.yaml"))
RUN = load(ROOT / "docs" / "data" / "speed_h200.json")
RECORDS = pipeline.shipped_database().records()
WIDTH = 100


def check(tables: Iterable[table.Table]) -> None:
    """Assert that tables fit, with every word of every cell; that rows do as one line, too, as they are in a pipe."""
    for each in tables:
        assert each.rows
        drawn = [line for line, _ in each.lines(WIDTH)]
        assert max(map(len, drawn)) <= WIDTH, "\n".join(drawn)
        words = set(" ".join(drawn).split())
        for row in each.rows:
            cells = [row] if isinstance(row, str) else [str(cell) for cell in row if cell is not None]
            assert {word for cell in cells for word in cell.split()} <= words
        _, *piped = [line for line, _ in each.lines(None)]
        assert max(map(len, piped)) <= WIDTH, "\n".join(piped)


def planned(spec: str) -> Plan:
    """Return the plan of a shipped spec, by the shipped records."""
    return pipeline.plan(spec, None, RECORDS)


@pytest.mark.parametrize("spec", SPECS)
def test_specs_and_schedules(spec: str) -> None:
    """The variants of a spec, and what serves them."""
    plan = planned(spec)
    check([build.spec_table(plan, verbose=False), *build.schedule_tables(plan, verbose=False)])
    shown = "\n".join(line for each in build.schedule_tables(plan, verbose=False) for line, _ in each.lines(None))
    assert not any(built.variant.key in shown for built in plan.variants)
    assert not any(choice.schedule.slug in shown for choice in plan.choices)


def test_kernels() -> None:
    """Resources of the committed package's kernels, with notes on those that spill."""
    manifest = json.loads((ROOT / "generated" / "h100" / "MANIFEST.json").read_text(encoding="utf-8"))
    named = {variant.key: name for variant, name in planned("h100.yaml").names.items()}
    note = "spills: tiles of the state alone take 88 of 255 registers a thread, and state weights 16"
    rows: list[CheckRow] = []
    for found in manifest["resources"]["kernels"]:
        key, kernel, arch = found.pop("variant"), found.pop("kernel"), found.pop("arch")
        source = "nearest 46c5eb08a7af, exact 46c5eb08a7af"
        rows.append(CheckRow(key, kernel, arch, "", Resources(**found), (), source, (note,), named[key]))
    check(build.kernel_tables(rows, verbose=False))
    drawn = " ".join(line for each in build.kernel_tables(rows, verbose=False) for line, _ in each.lines(None))
    assert "exact 46c5eb08a7af" in drawn
    assert "nearest" not in drawn
    assert f"m2rnn_7b bf16 backward {note}" in drawn


def reports(plan: Plan) -> Iterable[CaseReport]:
    """Yield a report of every case that a GPU runs on a spec's variants."""
    tensors = ("y", "state", "dweight", "dforget", "dinitial_state")
    for variant, name in plan.names.items():
        for case in cases(variant, 16, interpreted=False):
            results = tuple(TensorResult(tensor, 1e-3 + 1e-5 * len(case.name + name), 2e-3) for tensor in tensors)
            facts = (case.feature, case.name, 0, results, 1.0, "", plan.origin.spec_file)
            yield CaseReport(variant.key, str(variant.dtype), *facts, name=name)


def test_verifications() -> None:
    """Cases of the shipped matrix with the longest names, nearest to their budgets."""
    found = tuple(report for spec in ("matrix.yaml", "matrix_total.yaml") for report in reports(planned(spec)))
    assert len(found) > 10_000
    check(verify.verify_tables(VerifyOutcome("NVIDIA H200", found, 1.0), verbose=False))


def test_records() -> None:
    """Lists of records, and what serves a layer and why."""
    known = names.known_names(record.key.variant for record in RECORDS)
    assert known["k64_v16_q1_k1_v132_f132_w132_bf16_carry_approx"] == "m2rnn_7b bf16"
    check(db.list_tables(RECORDS, known))
    question = pipeline.Question("m2rnn_7b", "h200.yaml", arch="sm_90")
    check(db.why_table(answer, "m2rnn_7b bf16", 4) for answer in pipeline.why(pipeline.shipped_database(), question))


def tuned_of(record: Record) -> Tuned:
    """Return a search that found what a record says, after a hundred trials."""
    variant, device = parse_variant(record.key.variant), TARGETS["sm_90"]
    subject = Subject(variant, device, Objective.TRAIN, record.problem.batch, record.problem.seq)
    default = make_schedule()
    timing = record.timing
    assert timing is not None
    choice = Selection(record.schedule, {record.schedule: timing.tuned, default: timing.default}, (record.schedule,))
    finals = {record.schedule: Samples((1.0,), (1.0,), timing.peak_bytes)}
    trials = (Trial(record.schedule, "search", gpu_seconds=1000.0),) * 100
    outcome = Outcome(subject, default, trials, finals, choice, 10**6, 1000.0, 1000.0)
    return Tuned(Goal("", subject, subject.variant), outcome, (record,), Change((), (), ()))


def test_searches() -> None:
    """The closing tables of all shipped records, and the size of a space."""
    plan = planned("h200.yaml")
    check(tune.tuned_tables([tuned_of(record) for record in RECORDS], plan.names, verbose=False))
    (size,) = pipeline.dry_run(plan, TuneRequest(pipeline.shipped_database(), ("square",)), TARGETS["sm_90"], 2)
    check([tune.size_table(size, "square bf16")])


def test_the_bar_of_a_search() -> None:
    """One line on a terminal, whatever the search has found."""
    console = Console(width=WIDTH, file=io.StringIO(), force_terminal=True)
    progress = watcher.bar(console)
    best = Trial(make_schedule(), "search", samples=Samples((123.4,), (123.4,), 0))
    text = watcher.progress_text(SearchProgress(1000, 2000, best, 1234.5, {"launch": 100, "memory": 100}, 3599))
    progress.add_task(text, completed=1000, total=2000, stage="m2rnn_410m bf16 B8 S4096, 10 of 12")
    with console.capture() as capture:
        console.print(progress.get_renderable())
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", capture.get()).rstrip()
    assert text in drawn
    assert len(drawn) <= WIDTH
    assert "…" not in drawn


def test_benchmarks() -> None:
    """The committed run beside its peer, and the same with decoding and every kind of schedule."""
    check(bench.bench_tables(RUN, verbose=False))
    kinds = ("default", "auto", "compiled")
    rows = [replace(row, implementation=name) for row in RUN.rows if row.schedule for name in kinds]
    rows += [replace(row, failure="wrong: dq of plain must be within 1.00e-03, got 2.00e-01") for row in RUN.rows]
    check(bench.bench_tables(Document(RUN.environment, (*RUN.rows, *rows)), verbose=False))


def test_sweeps() -> None:
    """Five implementations along an axis."""
    row = next(row for row in RUN.rows if row.schedule)
    names = ("default", "auto", "tuned", "published", "another_kernel")
    rows = {x: tuple(replace(row, implementation=n, seq=x) for n in names) for x in (1, 2, 16384)}
    points = tuple(sweep.CurvePoint(x, True, found) for x, found in rows.items())
    check(sweep.sweep_tables(sweep.Sweep(sweep.Axis.SEQ, "m2rnn_410m", points)))


def test_which_calls_a_schedule_serves() -> None:
    """Buckets, from which or up to which they are, or which of many are not served."""
    assert names.calls(BUCKETS) == "all"
    assert names.calls(BUCKETS[:4]) == "up to 4"
    assert names.calls(BUCKETS[4:]) == "over 4"
    assert names.calls(BUCKETS[1:]) == "over 0.5"
    assert names.calls(BUCKETS[1:3]) == "≤1 ≤2"
    assert names.calls([Bucket.MORE]) == ">8"
    assert names.calls([Bucket.HALF, Bucket.MORE]) == "≤0.5 >8"
    assert names.calls(bucket for bucket in BUCKETS if bucket is not Bucket.FOUR) == "all but ≤4"


WORDS = {
    "portable_f16x2u4a_b16x2c2a_i32_ptx": "portable, 16 rows, 2 warps",
    "mma_f64x2u8a_b32x1c2as_i16_s7_ptx": "mma, 64/32 rows, 2/1 warps, 7 segments",
    "mma_f32x1u8p_b16x1c4as_i32_ptx": "mma, 32/16 rows, 1 warp",
    "wgmma_aa_i8_ptx": "wgmma, 64 rows, 4 warps",
}


@pytest.mark.parametrize(("slug", "words"), WORDS.items(), ids=WORDS.keys())
def test_words_of_schedules(slug: str, words: str) -> None:
    """Family, rows and warps, of both kernels where they differ, and segments."""
    assert parse(slug).describe() == words
    assert parse(slug).describe(parse(slug)) == parse(slug).describe() == words


def test_words_tell_knobs_from_the_default() -> None:
    """Knobs that the short words leave out are named if they differ from the default."""
    usual = make_schedule()
    other = replace(usual, interval=64, backward=replace(usual.backward, chunk=8))
    assert other.describe(usual).endswith(" warp; backward.chunk 8, interval 64")


def test_words_tell_the_knobs_of_another_family() -> None:
    """A knob that a family lacks is a constant of it, and is never said of it."""
    mma, wgmma = parse("mma_f32x1u8a_b32x1c2asx_i16_ptx"), parse("wgmma_ap_i8_ptx")
    assert wgmma.describe(mma) == "wgmma, 64 rows, 4 warps; backward.reduction partial, interval 8"
    assert mma.describe(wgmma).endswith(
        "; forward.unroll 8, backward.chunk 2, backward.reduction atomic, backward.scratch shared, interval 16"
    )


def named(variants: Sequence[tuple[Variant, tuple[str, ...]]]) -> list[str]:
    """Return the names of variants."""
    return list(layer_names(BuiltVariant(variant, layers) for variant, layers in variants).values())


def test_names_of_variants() -> None:
    """Layers and dtype, and what tells the variants of a grid apart; dims where no layer is known."""
    one, other = make_variant(64, 16, dtype="bf16"), make_variant(32, 16, dtype="bf16")
    assert named([(one, ("a",)), (other, ("b",))]) == ["a bf16", "b bf16"]
    assert named([(one, ("a", "b")), (other, ("a", "b"))]) == ["a/b bf16 K64", "a/b bf16 K32"]
    assert named([(one, ("a",)), (replace(one, tanh=TanhMode.APPROX), ("a",))]) == [
        "a bf16 tanh exact",
        "a bf16 tanh approx",
    ]
    assert named([(one, ())]) == [f"K64 V16 N{one.total_heads} bf16"]


@pytest.mark.parametrize("spec", SPECS)
def test_no_two_variants_of_a_spec_have_one_name(spec: str) -> None:
    """A name says which variant is meant, within a spec."""
    found = planned(spec).names
    assert len(set(found.values())) == len(found)


def test_a_table_wraps_between_words_only() -> None:
    """Numbers stay whole and to the right; the widest text is narrowed first, and no more than it has to be."""
    why = "one two three four one two three four one two three four"
    text = table.Table("t", ("layer", "ms", "why"), [("base fp32", "1.5", why), ("b", "10.25", "")])
    drawn = [line for line, _ in text.lines(40)]
    assert drawn == [
        "t",
        "layer         ms  why",
        "base fp32    1.5  one two three four one",
        "                  two three four one two",
        "                  three four",
        "b          10.25",
    ]
    assert [line for line, _ in text.lines(None)][2] == f"base fp32    1.5  {why}"


def test_headings_and_columns_without_cells() -> None:
    """Rows are set in below headings, and a column that no row has anything in is left out."""
    rows = ["m2rnn_7b bf16, B4 S4096", ("tuned", None, "1.0"), ("eager", "", "22.5")]
    drawn = [line for line, _ in table.Table("t", ("kernels", "host", "ms"), rows, ["a note"]).lines(80)]
    assert drawn == ["t", "  kernels    ms", "m2rnn_7b bf16, B4 S4096", "  tuned     1.0", "  eager    22.5", "a note"]


def test_a_terminal_shows_what_a_pipe_shows() -> None:
    """A wide terminal has the same lines, in colours; brackets are no markup."""
    command = ["spec", "show", "--spec", TINY]
    piped = CliRunner().invoke(app, command)
    drawn = CliRunner().invoke(app, command, env={"FORCE_COLOR": "1", "COLUMNS": "100"}, color=True)
    assert "\x1b[1m" in drawn.stdout
    assert piped.stdout == re.sub(r"\x1b\[[0-9;]*m", "", drawn.stdout)
