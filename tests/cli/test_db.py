"""``m2gen db`` and ``--db``: what they print, what they change, and what they refuse."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import KEY, TINY, document, fails, run
from records import H100, H200, SMS, environment, failed, winner
from support import ROOT, make_schedule

import m2gen.pipeline
from m2gen.bucket import Bucket
from m2gen.db import Database, Reason, Record, encode, files
from m2gen.device import TARGETS

FAST, SLOW = winner(high=0.5), winner(Bucket.ONE, high=0.9)
OTHER = winner(where=environment(H100))
STALE = replace(winner(seed=3, seq=32), provenance=replace(winner().provenance, kernel="0" * 12))
HUNG = failed(Reason.HANG, schedule=make_schedule())
RECORDS = (FAST, SLOW, OTHER, STALE, HUNG)


@pytest.fixture
def db(tmp_path: Path) -> str:
    """Return a database of two devices' records, one stale, and a failure."""
    Database(tmp_path / "db").add(RECORDS)
    return str(tmp_path / "db")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask about the records' devices, whatever GPU is at hand."""
    monkeypatch.setattr(sys.modules["m2gen.pipeline.db"], "detect", lambda: None)


def held(db: str) -> set[Record]:
    """Return a database's records."""
    return set(Database(Path(db)).records())


def test_list(db: str) -> None:
    """Winners with their times, whether they are stale or flagged; failures when asked for."""
    lines = run("db", "list", "--db", db).stdout.splitlines()
    assert lines[-1] == f"{db}: 4 winners, 1 failures, which --all lists"
    (fast,) = (line for line in lines if line.startswith(FAST.id))
    assert fast.split() == [FAST.id, "base", "fp32", "≤4", "portable,", "16", "rows,", "1", "warp", "0.490", "2.04x"]
    assert f"For train on {H200}" in lines
    assert f"For train on {H100}" in lines
    assert any(line.startswith(f"{STALE.id}: stale: measured kernels") for line in lines)
    assert not any(line.startswith(HUNG.id) for line in lines)
    assert f"{HUNG.id}  base fp32  portable, 16 rows, 1 warp  hang:" in run("db", "list", "--all", "--db", db).stdout
    everything = document("db", "list", "--all", "--db", db)
    assert {record["id"]: record["status"] for record in everything}[HUNG.id] == "failed"
    assert len(everything) == len(RECORDS)


def test_many_lines_that_are_no_records(db: str, tmp_path: Path) -> None:
    """Line ends of another system, say: the first are named, wherever they are read."""
    (path,) = {Path(db) / files.place(record) for record in (FAST, SLOW)}
    path.write_bytes(path.read_bytes() + b"\xff\n{}\n[]\nnull\n" * 50)
    shown = run("db", "list", "--db", db)
    lines = shown.stderr.splitlines()
    assert shown.exit_code == 0
    assert (len(lines), lines[-1]) == (21, "m2gen: warning: and 180 more")
    assert all(line.startswith(f"m2gen: warning: not used: {path}:") for line in lines[:-1])
    for command in (("merge", db), ("diff", db, db), ("import", str(path))):
        refused = run("db", *command, "--db", str(tmp_path / "new"))
        assert refused.exit_code == 2
        assert refused.stderr.splitlines()[20:] == ["m2gen: and 180 more"]
    pruned = run("db", "prune", "--unreadable", "--dry-run", "--db", db).stdout.splitlines()
    assert pruned[-2:] == ["and 180 more", "1 record and 200 lines would be removed"]
    assert len(document("db", "prune", "--unreadable", "--dry-run", "--db", db)["lines"]) == 200


def test_records_of_another_triton_are_flagged(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of another toolchain are only flagged."""
    for here, said in (("3.6.0", ""), ("9.9.9", "measured with triton 3.6.0, here 9.9.9")):
        monkeypatch.setattr(sys.modules["m2gen.pipeline.db"], "triton_version", lambda here=here: here)
        assert document("db", "show", FAST.id, "--db", db)["state"] == said


def test_show(db: str) -> None:
    """A record by the beginning of its id, field by field or as the line that it is."""
    lines = [line.split(maxsplit=1) for line in run("db", "show", FAST.id[:8], "--db", db).stdout.splitlines()]
    assert ["environment.device", H200] in lines
    assert ["timing.tuned.high_ms", "0.5"] in lines
    shown = document("db", "show", FAST.id, "--db", db)
    assert shown.items() >= json.loads(encode(FAST)).items()
    assert "must be that of one record, got 'zzz' of no record" in fails(2, "db", "show", "zzz", "--db", db)


def test_why_a_record_serves(db: str) -> None:
    """The tier and record of a call, and a reason for every other record of the variant."""
    (answer,) = document("db", "why", KEY, "--batch", str(FAST.problem.batch), "--db", db)
    assert (answer["bucket"], answer["tier"], answer["record"]) == ("<=4", "exact", FAST.id)
    assert (answer["device"], answer["sm_count"]) == (H200, SMS)
    why = {rejection["record"]: rejection["why"] for rejection in answer["rejected"]}
    assert why[SLOW.id] == "bucket <=1 is further than <=4"
    assert why[OTHER.id] == f"of another device, {H100}"
    assert why[STALE.id].startswith("stale: measured kernels 000000000000")
    assert why[HUNG.id] == "records a failure: hang"
    assert next(iter(why)) == SLOW.id
    text = run("db", "why", KEY, "--batch", str(FAST.problem.batch), "--seq", "100", "--db", db).stdout.splitlines()
    assert text[0] == "The length of sequences (100) plays no part in choosing a schedule."
    assert text[1].startswith("base fp32, train, batch ")
    assert text[1].endswith(f"≤4 programs/SM on {H200} (sm_90, 132 SMs): exact {FAST.id}")
    assert any(line.startswith(FAST.id) and line.endswith("serves: exact") for line in text)


def test_why_without_a_gpu_is_about_the_specs_first_target(db: str) -> None:
    """A record of another arch in the database, whose name comes first, changes no arch and no answer."""
    where = environment("AMD Instinct MI250X", "gfx90a")
    Database(Path(db)).add([winner(where=where, schedule=make_schedule(tanh="exp"))])
    (one, *_) = document("db", "why", "base", "--spec", TINY, "--batch", str(FAST.problem.batch), "--db", db)
    assert (one["arch"], one["device"], one["record"]) == ("sm_90", H200, FAST.id)


def test_why_of_a_layer_and_a_device(db: str) -> None:
    """A layer of a spec is all its variants, in every bucket; a device may be named as its folder is."""
    answers = document("db", "why", "base", "--spec", TINY, "--device", "nvidia_h100_80gb_hbm3", "--db", db)
    assert len(answers) == 2 * len(Bucket)
    served = {(a["variant"], a["bucket"]): (a["tier"], a["record"]) for a in answers}
    assert served[KEY, "<=4"] == ("exact", OTHER.id)
    assert served[KEY, ">8"] == ("nearest", OTHER.id)
    assert {tier for (variant, _), (tier, _) in served.items() if variant != KEY} == {"default"}
    unknown = fails(2, "db", "why", KEY, "--device", "H7", "--db", db)
    assert f"--device must be of records ({H100}, {H200}) or come with --target, got 'H7'" in unknown
    (answer,) = document("db", "why", KEY, "--device", "H7", "--target", "sm_90", "--batch", "1", "--db", db)
    assert (answer["device"], answer["sm_count"], answer["tier"]) == ("H7", 132, "arch")
    assert "LAYER must be among base, grouped" in fails(2, "db", "why", "none", "--spec", TINY, "--db", db)
    assert "must come with the --spec that has it" in fails(2, "db", "why", "base", "--db", db)


def test_why_without_any_record(tmp_path: Path) -> None:
    """An arch without records is answered from the table of targets."""
    (tmp_path / "empty").mkdir()
    answers = document("db", "why", KEY, "--target", "sm_80", "--db", str(tmp_path / "empty"))
    assert {(a["device"], a["sm_count"], a["tier"]) for a in answers} == {("sm_80", 108, "default")}


def test_why_agrees_with_the_build(db: str) -> None:
    """The explanation agrees with the build."""
    plan = m2gen.pipeline.plan(TINY, records=held(db))
    built = {
        (c.variant.key, bucket): (c.tier, c.record and c.record.id)
        for c in plan.choices
        if c.device == TARGETS["sm_90"]
        for bucket in c.buckets
    }
    answers = [
        a
        for layer in ("base", "grouped")
        for a in document("db", "why", layer, "--spec", TINY, "--target", "sm_90", "--db", db)
    ]
    assert {(a["variant"], a["bucket"]): (a["tier"], a["record"]) for a in answers} == built


def test_diff_of_records_and_of_databases(db: str, tmp_path: Path) -> None:
    """Fields of two records; records of two databases, or of their exports."""
    rows = document("db", "diff", FAST.id, SLOW.id, "--db", db, status=1)
    assert {"field": "key.bucket", "a": "<=4", "b": "<=1"} in rows
    assert document("db", "diff", FAST.id, FAST.id, "--db", db) == []
    run("db", "export", str(tmp_path / "all.jsonl"), "--db", db)
    assert run("db", "diff", db, str(tmp_path / "all.jsonl")).exit_code == 0
    other = Database(tmp_path / "other")
    other.add([SLOW, winner(high=0.4)])
    rows = document("db", "diff", str(tmp_path / "other"), db, status=1)
    sides = {(row["side"], row["record"]): row["what"] for row in rows}
    assert sides["A", winner(high=0.4).id] == sides["B", FAST.id] == "other record of one key"
    assert sides["B", HUNG.id] == "only there"
    assert ("A", SLOW.id) not in sides
    assert "must both be" in fails(2, "db", "diff", db, FAST.id)


def test_merge(db: str, tmp_path: Path) -> None:
    """The preferred record of each key stays, and the command prints what changed."""
    better, worse = winner(high=0.4), winner(Bucket.ONE, high=0.95)
    Database(tmp_path / "other").add([better, worse, OTHER])
    result = run("db", "merge", str(tmp_path / "other"), "--db", db)
    assert result.stdout.startswith("1 record added, 1 replaced, 2 not added")
    assert held(db) == ({*RECORDS} - {FAST}) | {better}
    (tmp_path / "other" / files.place(OTHER)).write_text("torn", encoding="utf-8")
    assert "must be JSON" in fails(2, "db", "merge", str(tmp_path / "other"), "--db", db)


def test_a_folder_without_records_is_no_database_to_merge(db: str, tmp_path: Path) -> None:
    """A mistyped folder is an error, be it of something else or below a database's own folder."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme").write_text("no record", encoding="utf-8")
    for other in (tmp_path / "notes", Path(db) / "sm_90"):
        line = fails(2, "db", "merge", str(other), "--db", str(tmp_path / "fresh"))
        assert line == f"m2gen: {other} must be a database with at least one record, got none"
        assert "must be a database with at least one record" in fails(2, "db", "diff", db, str(other))
    assert not (tmp_path / "fresh").exists()


def test_prune(db: str, tmp_path: Path) -> None:
    """Superfluous records go, with the reason; failures and broken lines only on request; a dry run changes nothing."""
    dead = failed(Reason.WRONG, where=environment(H100))
    Database(Path(db)).add([dead])
    expected = {STALE.id: "stale", OTHER.id: f"its kernels failed: record {dead.id}"}
    before = held(db)
    for options, removed in ((("--dry-run",), False), ((), True)):
        found = document("db", "prune", "--db", db, *options)
        assert found["removed"] is removed
        assert {r["record"]: r["why"].split(":")[0] for r in found["records"]} == {
            i: r.split(":")[0] for i, r in expected.items()
        }
        assert held(db) == (before - {STALE, OTHER} if removed else before)
    path = Path(db) / files.place(FAST)
    path.write_bytes(path.read_bytes() + b"{torn")
    assert "2 records and 1 line removed" in run("db", "prune", "--failed", "--unreadable", "--db", db).stdout
    assert held(db) == {FAST, SLOW}
    assert path.read_bytes().endswith(b"}\n")


def test_export_delete_import(db: str, tmp_path: Path) -> None:
    """The way out and in again, by commands, gives the same bytes."""
    before = {p.name: p.read_bytes() for p in Path(db).rglob("*.jsonl")}
    out = str(tmp_path / "all.jsonl")
    assert run("db", "export", out, "--db", db).stdout == f"{out}: {len(RECORDS)} records\n"
    fresh = str(tmp_path / "fresh")
    assert len(document("db", "import", out, "--db", fresh)["added"]) == len(RECORDS)
    assert {p.name: p.read_bytes() for p in Path(fresh).rglob("*.jsonl")} == before
    assert len(document("db", "import", out, "--db", fresh)["refused"]) == len(RECORDS)


def test_an_import_that_is_not_all_records_changes_nothing(db: str, tmp_path: Path) -> None:
    """One wrong line among good ones: each is named, and nothing is written."""
    before = held(db)
    new = winner(Bucket.TWO)
    lines = [encode(new), encode(new).replace("sm_90", "../../sm"), encode(FAST).replace('"seed": 0', '"seed": 1')]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = run("db", "import", str(tmp_path / "x.jsonl"), "--db", db)
    assert result.exit_code == 2
    assert [line.split(": ")[1].split(":")[-1] for line in result.stderr.splitlines()] == ["2", "3"]
    assert held(db) == before


@pytest.mark.parametrize("command", [["list"], ["show", "a"], ["why", KEY], ["prune"], ["export", "x"]], ids=" ".join)
def test_a_database_that_is_not_there(tmp_path: Path, command: list[str]) -> None:
    """A mistyped folder is a usage error, and is not made."""
    missing = str(tmp_path / "missing")
    assert f"--db must be a folder, got {missing}" in fails(2, "db", *command, "--db", missing)
    assert not Path(missing).exists()


def test_builds_take_the_database_that_is_named(db: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--db`` or its variable name a database, ``--no-db`` none; the table says which record serves."""
    stage = sys.modules["m2gen.pipeline.build"]
    monkeypatch.setattr(stage, "check", lambda planned, progress: [])
    build = ("build", "--spec", TINY, "--no-verify", "--out", str(tmp_path))
    rows = [row for row in document(*build, "--db", db)["schedules"] if row["record"]]
    assert {(row["tier"], row["record"], row["device"]) for row in rows} == {
        (tier, record.id, H200) for tier in ("exact", "nearest") for record in (FAST, SLOW)
    }
    table = run(*build, "--db", db).stdout
    assert f"base fp32 ≤4 portable, 16 rows, 1 warp exact {FAST.id} base" in " ".join(table.split())
    assert f"Records of {H200}" in table
    assert KEY not in table
    assert f"{KEY} {FAST.schedule.slug}" in " ".join(run(*build, "--db", db, "--verbose").stdout.split())
    assert run("build", "--spec", TINY, "--check", "--out", str(tmp_path), "--db", db).exit_code == 0
    assert run("build", "--spec", TINY, "--check", "--out", str(tmp_path), "--no-db").exit_code == 1
    monkeypatch.setenv("M2GEN_TUNING_DB", db)
    assert document(*build)["schedules"] == document(*build, "--db", db)["schedules"]
    assert not any(row["record"] for row in document(*build, "--no-db")["schedules"])


def test_a_line_that_is_no_record_is_warned_of(db: str) -> None:
    """A build goes on without it, and says where it is."""
    path = Path(db) / files.place(FAST)
    path.write_bytes(path.read_bytes() + b'{"torn')
    result = run("db", "list", "--db", db)
    number = len(path.read_bytes().splitlines())
    assert result.exit_code == 0
    warning = f"m2gen: warning: not used: {path}:{number}: the file ends within a line"
    assert result.stderr.startswith(warning)
    assert FAST.id in result.stdout


def test_the_shipped_database_can_be_read() -> None:
    """Every line that is committed is a record of this schema, in its place."""
    assert Database(ROOT / "tuning_db").contents().faults == ()
