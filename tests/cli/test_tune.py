"""The commands as they are typed: sizes without a GPU, tables, the report, and records held against the GPU again."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import simulated
import torch
from command_line import document, fails, run
from scripted_nvml import Script, install
from searches import DEFAULT, NEIGHBOUR, SPEC

from m2gen.cli.show import charts
from m2gen.cli.tune import duration, memory
from m2gen.db import Clocks, Database, Throttled, ThrottleReason, encode
from m2gen.db.choice import module_name
from m2gen.schedule import parse
from m2gen.tune.memory import MemoryBound
from m2gen.tune.services import TuningContext
from m2gen.variant import parse_variant

BUILD = sys.modules["m2gen.pipeline.build"]
"""The module, whose name in the package is that of its function."""
TUNE = ("tune", "--spec", "one.yaml")
DB = ("--db", "db")


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TuningContext:
    """Have commands find a simulated GPU; the working directory has a spec, and a cache of its own."""
    simulated.place(tmp_path, monkeypatch, SPEC)
    simulated.script(tmp_path / "script.json")
    found = simulated.context()
    monkeypatch.setattr("m2gen.cli.show.tune.this_tuning_context", lambda command: found)
    monkeypatch.setattr("m2gen.pipeline.this_tuning_context", lambda command: found)
    return found


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("10m", 600.0), ("1.5m", 90.0), ("2h", 7200.0), ("45", 45.0), ("0.5", 0.5)]
)
def test_times_have_units(text: str, seconds: float) -> None:
    """Seconds, minutes and hours; a number alone is of seconds."""
    assert duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("2GB", MemoryBound(size=2 * 10**9)), ("1.5mb", MemoryBound(size=1_500_000)), ("3kB", MemoryBound(size=3000)),
        ("2GiB", MemoryBound(size=2**31)), ("1MiB", MemoryBound(size=2**20)), ("0.5KiB", MemoryBound(size=512)),
        ("10", MemoryBound(size=10)), ("10B", MemoryBound(size=10)), ("1x", MemoryBound(times=1.0)),
        ("2.5x", MemoryBound(times=2.5)), ("any", MemoryBound()),
    ],
)  # fmt: skip
def test_sizes_have_units(text: str, bound: MemoryBound) -> None:
    """Powers of ten and of two are told apart, whatever the case of their letters."""
    assert memory(text) == bound


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "x", "m"])
def test_what_is_no_time_and_no_size(text: str) -> None:
    """Neither nothing, nor what is below it, nor what has no end."""
    for parse_text, units in ((duration, ("", "s", "m", "h")), (memory, ("", "x", "GB", "B"))):
        for unit in units:
            with pytest.raises(ValueError):  # noqa: PT011  (float's own words, or the text)
                parse_text(text + unit)
    with pytest.raises(ValueError, match=r"^0\.9x$"):
        memory("0.9x")


class Page(HTMLParser):
    """Collects the external references of a page, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag in ("link", "iframe", "img"):  # a script without a source is in the page
            self.outside.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_dry_run_needs_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how many points there are, why the others are none, and how long they take."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text(SPEC, encoding="utf-8")
    (size,) = document(*TUNE, "--dry-run", "--target", "sm_90")
    assert size["points"] + sum(size["pruned"].values()) == size["product"] == sum(size["products"].values())
    assert size["expected_seconds"] >= size["points"]
    text = run(*TUNE, "--dry-run", "--target", "sm_90").output
    assert f"points  {' ' * 57}{size['points']}"[:6] in text
    assert "interval must be a multiple of forward.unroll = 8" in text
    (bounded,) = document(*TUNE, "--dry-run", "--target", "sm_90", "--max-memory", "1GB")
    assert bounded["pruned"]["memory over --max-memory"] > 0
    assert not (tmp_path / "db").exists()


def test_a_dry_run_says_what_would_be_tried_first(context: TuningContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidates are those that the search then tries, in order, each with its reason; a known failure is not."""
    monkeypatch.setattr(sys.modules["m2gen.pipeline.tune"], "detect", lambda: context.device)
    monkeypatch.setattr(sys.modules["m2gen.pipeline.tune"], "environment", lambda device: context.environment)
    (size,) = document(*TUNE, *DB, "--dry-run")
    slugs = [each["schedule"] for each in size["first"]]
    assert len(slugs) == len(set(slugs)) > 10
    assert size["first"][0] == {"schedule": DEFAULT, "origin": "default"}
    table = run(*TUNE, *DB, "--dry-run").stdout
    assert all(parse(slug).describe(parse(DEFAULT)) in table for slug in slugs)
    assert {each["origin"] for each in size["first"]} == {"default", "tile", "neighbour"}
    log = simulated.script(Path("script.json"), wrong=[NEIGHBOUR])
    assert run(*TUNE, *DB, "--trials", str(len(slugs)), "--budget", "600s", "--quiet").exit_code == 0
    tried = list(dict.fromkeys(line.split()[1] for line in simulated.lines(log) if line.startswith("screen ")))
    assert tried[: len(slugs)] == slugs
    (again,) = document(*TUNE, *DB, "--dry-run")
    assert NEIGHBOUR in slugs
    assert NEIGHBOUR not in {each["schedule"] for each in again["first"]}
    assert "record" in {each["origin"] for each in again["first"]}


def test_a_dry_run_where_all_is_known_to_fail(context: TuningContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random search begins with the default alone, which failed: nothing comes first, and that is said."""
    monkeypatch.setattr(sys.modules["m2gen.pipeline.tune"], "detect", lambda: context.device)
    monkeypatch.setattr(sys.modules["m2gen.pipeline.tune"], "environment", lambda device: context.environment)
    simulated.script(Path("script.json"), wrong=[DEFAULT])
    assert run(*TUNE, *DB, "--trials", "1", "--budget", "60s").exit_code == 1
    asked = (*TUNE, *DB, "--dry-run", "--sampler", "random")
    (size,) = document(*asked)
    assert size["first"] == []
    assert "each of these is known to fail" in run(*asked).stdout


def test_no_winner_within_the_memory_bound(context: TuningContext) -> None:
    """It is said that the bound excludes all that passed, and not that there was no time."""
    found = run(*TUNE, *DB, "--trials", "5", "--budget", "60s", "--max-memory", "10", "--quiet")
    assert found.exit_code == 1
    assert "m2gen: base fp16: no schedule that passed is within --max-memory" in found.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("command", [TUNE, ("db", "replay"), ("db", "verify")], ids=" ".join)
def test_without_a_gpu(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: TuningContext
) -> None:
    """One line that says what is missing, status 2."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    if command[0] == "tune":
        line = fails(2, *command, *DB)
    else:
        monkeypatch.setattr("m2gen.pipeline.open_database", lambda db: _holding(tmp_path))
        line = fails(2, *command, *(["x"] if command[1] == "replay" else []))
    assert (
        line
        == f"m2gen: m2gen {command[0]}{' ' + command[1] if command[0] == 'db' else ''} must run on a machine "
        + ("whose GPU torch can use, got none")
    )


def _holding(folder: Path) -> Database:
    class Any_(Database):
        def find(self, prefix: str):  # type: ignore[no-untyped-def]
            return None

    return Any_(folder / "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "soon"), "--budget must be a time such as 10m or 90s, got 'soon'"),
        (("--budget", "-5s"), "--budget must be a time such as 10m or 90s, got '-5s'"),
        (
            ("--max-memory", "lots"),
            "--max-memory must be a size such as 2GB, a multiple such as 1.5x, or any, got 'lots'",
        ),
        (("--layer", "other"), "--layer must be among base, got 'other'"),
        (("--target", "sm_90"), "--target must be given with --dry-run only"),
        (("--report", "none/out.html"), "--report none/out.html must be writable: No such file or directory"),
        (("--storage", "nonsense", "--trials", "1"), "--storage must be a database URL"),
    ],
)
def test_options_that_cannot_be_used(arguments: tuple[str, ...], message: str, context: TuningContext) -> None:
    """Each error is one line with status 2, and no database is made."""
    assert message in fails(2, *TUNE, *DB, *arguments, "--quiet")
    assert not Path("db").exists()


def test_a_spec_without_workloads(context: TuningContext) -> None:
    """There is nothing to tune for."""
    Path("one.yaml").write_text(SPEC.replace("    workloads: [{batch: 8, seq: 4096}]\n", ""), encoding="utf-8")
    assert "must have a layer with workloads to tune for" in fails(2, *TUNE, *DB)


def test_a_layer_without_workloads_among_others(context: TuningContext) -> None:
    """One that was asked for by name is not left out in silence; workloads of packed batches have no searches."""
    base = SPEC[SPEC.index("  base:") :]
    bare = base.replace("base:", "bare:").replace("    workloads: [{batch: 8, seq: 4096}]\n", "")
    packed = base.replace("base:", "short:").replace("seq: 4096", "seq: 4096, packed: true")
    Path("one.yaml").write_text(SPEC + bare + packed, encoding="utf-8")
    said = fails(2, *TUNE, *DB, "--layer", "base", "--layer", "bare", "--layer", "short")
    assert "bare, short must have workloads of equal sequences to tune for, got none" in said


def test_the_closing_table_and_progress(context: TuningContext) -> None:
    """Default against tuned, what the search cost, and a line a trial with the best so far."""
    result = run(*TUNE, *DB, "--trials", "30", "--budget", "60s")
    assert result.exit_code == 0, result.output
    (record,) = Database(Path("db")).records()
    times, costs = (cells_of(table) for table in result.stdout.split("\n\n"))
    assert record.timing is not None
    assert (times["layer"], times["size"]) == (costs["layer"], costs["size"]) == ("base fp16", "B8 S4096")
    assert times["default ms"] == f"{record.timing.default.median_ms:.3f}"
    assert times["tuned ms"] == f"{record.timing.tuned.median_ms:.3f}"
    assert times["record"] == record.id
    assert (costs["schedule"], costs["trials"]) == (record.schedule.describe(), "30")
    trials = [line for line in result.stderr.splitlines() if " ms; best " in line]
    assert len(trials) == 30
    assert "left" in trials[-1]
    knobs = parse(NEIGHBOUR).describe(parse(DEFAULT))
    assert any(f" {knobs} (" in line for line in trials), "trials say in which knobs they differ from the default"
    assert record.schedule.slug not in result.output
    again = run(*TUNE, *DB, "--trials", "30", "--budget", "60s", "--verbose")
    assert f"{record.key.variant}  {record.schedule.slug}" in again.stdout


def cells_of(table: str) -> dict[str, str]:
    """Return the only row of a table by its columns, which two spaces or more are between."""
    _, header, row, *_ = table.splitlines()
    return dict(zip(re.split(r" {2,}", header), re.split(r" {2,}", row), strict=True))


def test_the_next_build_uses_what_was_found(context: TuningContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the default serves every call; after, the record, and the build's table says which tier of it where."""
    monkeypatch.setattr(BUILD, "check", lambda planned, progress: [])
    build = ("build", "--spec", "one.yaml", "--no-verify", *DB)
    Path("db").mkdir()
    assert [served["tier"] for served in document(*build)["schedules"]] == ["default"]
    assert run(*TUNE, *DB, "--trials", "30", "--budget", "60s").exit_code == 0
    (record,) = Database(Path("db")).records()
    slug, bucket = record.schedule.slug, str(record.key.bucket)
    assert slug != DEFAULT
    text = run(*build).stdout
    calls = bucket.replace("<=", "≤")
    for tier, served in ((f"exact {record.id}", calls), (f"nearest {record.id}", f"all but {calls}")):
        (line,) = (line for line in text.splitlines() if line.endswith(tier))
        assert re.split(r" {2,}", line)[1:3] == [served, record.schedule.describe()]
    assert "Records of Simulated GPU" in text
    served = document(*build)["schedules"]
    assert {(each["tier"], each["schedule"], each["record"]) for each in served} == {
        (tier, slug, record.id) for tier in ("exact", "nearest")
    }
    kernels = {path.stem for path in Path("generated/one/kernels").glob("*.py")}
    variant = parse_variant(record.key.variant)
    assert module_name(variant, record.schedule) in kernels
    assert module_name(variant, parse(DEFAULT)) not in kernels


def test_json_is_one_document(context: TuningContext) -> None:
    """The document has the new records, and standard output has nothing else."""
    (found,) = document(*TUNE, *DB, "--trials", "20", "--budget", "60s")
    (record,) = Database(Path("db")).records()
    assert found["records"] == [record.id]
    assert found["schedule"] == record.schedule.slug
    assert found["trials"] == 20
    assert found["tuned_ms"][1] <= found["default_ms"][1]


def test_a_throttled_search_says_so(context: TuningContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the summary, in the document, in the winner's record alone, in `db show`, and on the report's page."""
    install(monkeypatch, Script([(1410, "SwPowerCap")]))
    simulated.script(Path("script.json"), wrong=[NEIGHBOUR])
    done = run(*TUNE, *DB, "--trials", "30", "--budget", "60s", "--report", "out.html")
    warning = "the GPU was throttled, 100% of the time by power (1410 of 1980 MHz): times may not repeat"
    assert f"m2gen: base fp16: {warning}" in done.stderr
    (winner,) = (r for r in Database(Path("db")).records() if not r.failure)
    assert all(r.clocks is None for r in Database(Path("db")).records() if r.failure)
    assert winner.clocks == Clocks(1410, 1980, 2619, (Throttled(ThrottleReason.POWER, 1.0),))
    shown = run("db", "show", winner.id, *DB).output
    assert warning in shown
    assert "clocks.throttled[0].reason" in shown
    assert document("db", "show", winner.id, *DB)["clocks"]["sm_mhz"] == 1410
    assert f"In this search {warning}" in " ".join(Page(Path("out.html").read_text(encoding="utf-8")).words)
    (found,) = document(*TUNE, *DB, "--trials", "30", "--budget", "60s")
    assert found["clocks"]["throttled"] == [{"reason": "power", "part": 1.0}]


def test_a_search_at_full_clocks_warns_of_nothing(context: TuningContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clocks are in the record all the same; where they are not known, the record has no such field."""
    install(monkeypatch, Script([(1980, "")]))
    done = run(*TUNE, *DB, "--trials", "5", "--budget", "60s")
    assert "throttled" not in done.output + done.stderr
    (record,) = Database(Path("db")).records()
    assert record.clocks == Clocks(1980, 1980, 2619)
    assert "throttled, " not in run("db", "show", record.id, *DB).output
    install(monkeypatch, Script(missing=frozenset({"nvmlInit"})))
    run(*TUNE, "--db", "other", "--trials", "5", "--budget", "60s")
    (other,) = Database(Path("other")).records()
    assert other.clocks is None
    assert '"clocks"' not in encode(other)


def test_the_report_is_one_page(context: TuningContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refers to nothing outside itself, and has knobs, failures and limits of the GPU, without plotly, too."""
    monkeypatch.setattr(charts, "available", lambda: False)
    simulated.script(Path("script.json"), wrong=[NEIGHBOUR])
    assert run(*TUNE, *DB, "--trials", "30", "--budget", "60s", "--report", "out.html").exit_code == 0
    text = Path("out.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.outside == []
    assert "http" not in text
    words = " ".join(page.words)
    assert "pip install 'm2gen[report]'" in words
    wrong = parse(NEIGHBOUR).describe(parse(DEFAULT))
    for expected in ("Finalists", "History", "Importance of each knob", "forward.rows", "wrong", wrong, "Roofline"):
        assert expected in words
    assert "peaks are not known" in words, "of a simulated GPU"
    (record,) = (r for r in Database(Path("db")).records() if not r.failure)
    assert record.schedule.describe() in words
    assert f'title="{record.schedule.slug}"' in text


def test_the_report_has_interactive_figures(context: TuningContext) -> None:
    """The history and the importances are Optuna's figures, whose points say which trial each is."""
    pytest.importorskip("plotly", reason="needs plotly (pip install 'm2gen[report]')")
    simulated.script(Path("script.json"), wrong=[NEIGHBOUR])
    assert run(*TUNE, *DB, "--trials", "30", "--budget", "60s", "--report", "out.html").exit_code == 0
    text = Path("out.html").read_text(encoding="utf-8")
    assert Page(text).outside == []
    history, importance = (part.split("</script>")[0] for part in text.split("Plotly.newPlot(")[-2:])
    assert "Best Value" in history
    assert history.count(' ms"') == 29, "of 30 trials one failed"
    assert "(default), 3.7" in history
    assert "forward.rows" in importance
    assert "m2gen[report]" not in text


def test_the_report_of_a_known_gpu_has_its_limits(context: TuningContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are fractions of the winner's time; that of tanh is the largest for layers like the 7B one."""
    known = replace(context, environment=replace(context.environment, device="NVIDIA H200"))
    monkeypatch.setattr("m2gen.cli.show.tune.this_tuning_context", lambda command: known)
    assert run(*TUNE, *DB, "--trials", "12", "--budget", "60s", "--report", "out.html").exit_code == 0
    words = " ".join(Page(Path("out.html").read_text(encoding="utf-8")).words)
    assert "peaks are not known" not in words
    assert words.index("tanh") < words.index("memory traffic")


def test_verify_holds_records_against_the_gpu(context: TuningContext) -> None:
    """A record that fails now is disqualified by a failure beside it; the next look skips it."""
    run(*TUNE, *DB, "--trials", "15", "--budget", "60s")
    (record,) = Database(Path("db")).records()
    (row,) = document("db", "verify", *DB)
    assert row == {"id": record.id, "variant": record.key.variant, "schedule": record.schedule.slug, "result": "ok"}
    simulated.script(Path("script.json"), wrong=[record.schedule.slug])
    (row,) = document("db", "verify", record.id[:6], *DB, status=1)
    assert row["result"].startswith("FAILED: wrong: dq of plain must be within")
    assert len(Database(Path("db")).records()) == 2
    (row,) = document("db", "verify", *DB)
    assert row["result"].startswith("skipped: its kernels failed already, record ")
    why = run("db", "why", record.key.variant, "--target", "sm_90", *DB).output
    assert "failed" in why


def test_verify_skips_other_devices(context: TuningContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are only checked on the GPU that measured them."""
    run(*TUNE, *DB, "--trials", "3", "--budget", "60s")
    other = replace(context, environment=replace(context.environment, device="Another"))
    monkeypatch.setattr("m2gen.pipeline.this_tuning_context", lambda command: other)
    (row,) = document("db", "verify", *DB)
    assert row["result"] == "skipped: of another device: Simulated GPU, here Another"
    (record,) = Database(Path("db")).records()
    assert "must be one that can be measured here" in fails(2, "db", "replay", record.id, *DB, "--quiet")


def test_replay_measures_again(context: TuningContext) -> None:
    """Recorded and new times stand side by side, both measured alternately with the default."""
    run(*TUNE, *DB, "--trials", "40", "--budget", "60s")
    (record,) = Database(Path("db")).records()
    found = document("db", "replay", record.id[:8], *DB)
    assert found["id"] == record.id
    assert found["faster_than_default"]
    now, then = found["tuned"]["now"], found["tuned"]["recorded"]
    assert now["median_ms"] == pytest.approx(then["median_ms"], rel=0.01)
    text = run("db", "replay", record.id, *DB).output
    assert "default, now" in text
    assert "the record's schedule is still the best" in text
    simulated.script(Path("script.json"), wrong=[record.schedule.slug])
    assert "wrong: dq of plain" in fails(1, "db", "replay", record.id, *DB, "--quiet")
    assert json.loads(Path("script.json").read_text())["wrong"] == [record.schedule.slug]
