"""A record's way from a GPU that only somebody else has into the shipped database, and into what builds use."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import simulated
from command_line import document, fails, run
from records import H100, H200, environment, failed, winner
from searches import SPEC

import m2gen.pipeline  # noqa: F401  (fills sys.modules)
from m2gen.bucket import Bucket
from m2gen.db import Database, Reason, Tier
from m2gen.device import TARGETS
from m2gen.pipeline.contribute import anonymous, contribution
from m2gen.pipeline.db import Superfluous

B200 = replace(TARGETS["sm_100"], name="NVIDIA B200")
FOREIGN = SPEC.replace("targets: sm_90", "targets: sm_100")
MINE, SHIPPED = ("--db", "mine"), ("--db", "shipped")


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have commands find a simulated B200, in a folder with a spec for it; nothing of it has been measured."""
    simulated.place(tmp_path, monkeypatch, FOREIGN)
    simulated.script(tmp_path / "script.json")
    found = simulated.context(B200)
    found = replace(found, environment=replace(found.environment, arch=B200.arch), worker="alices-workstation:gpu-1")
    monkeypatch.setattr("m2gen.cli.show.tune.this_tuning_context", lambda command: found)
    monkeypatch.setattr(sys.modules["m2gen.pipeline.db"], "detect", lambda: None)
    monkeypatch.setattr(sys.modules["m2gen.pipeline.build"], "check", lambda planned, progress: [])
    Database(tmp_path / "shipped").add([winner(), winner(Bucket.ONE, where=environment(H100))])
    return tmp_path


def test_the_whole_way(stranger: Path) -> None:
    """Tuned there, given, imported here: then a build for that architecture uses it, and no other build changes."""
    build = ("build", "--spec", "one.yaml", "--no-verify", *SHIPPED)
    assert [served["tier"] for served in document(*build)["schedules"]] == ["default"]
    assert run("tune", "--spec", "one.yaml", *MINE, "--trials", "30", "--budget", "60s", "--quiet").exit_code == 0
    given = document("db", "contribute", "b200.jsonl", *MINE, "--to", "shipped")
    (effect,) = given["effects"]
    assert (effect["before"], effect["after"]) == ("default", f"exact {effect['record']}")
    assert "alice" not in (stranger / "b200.jsonl").read_text(encoding="utf-8")
    assert "alice" in next((stranger / "mine").rglob("*.jsonl")).read_text(encoding="utf-8")

    others = set(Database(stranger / "shipped").records())
    assert document("db", "import", "b200.jsonl", *SHIPPED)["added"] == given["records"]
    assert others < set(Database(stranger / "shipped").records())
    served = document(*build)["schedules"]
    assert {each["tier"] for each in served} == {"exact", "nearest"}
    assert {each["record"] for each in served} == {effect["record"]}
    why = run("db", "why", "base", "--spec", "one.yaml", "--device", B200.name, *SHIPPED).stdout
    assert effect["record"] in why
    assert "already there" in fails_first("db", "contribute", "again.jsonl", *MINE, "--to", "shipped")
    assert not (stranger / "again.jsonl").exists()


def fails_first(*arguments: str) -> str:
    """Return what a failing command prints to standard error."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return str(result.stderr)


def test_a_file_that_was_touched_is_refused(stranger: Path) -> None:
    """Whatever somebody changes on the way, nothing is written."""
    assert run("tune", "--spec", "one.yaml", *MINE, "--trials", "12", "--budget", "60s", "--quiet").exit_code == 0
    assert run("db", "contribute", "b200.jsonl", *MINE, "--to", "shipped").exit_code == 0
    lines = (stranger / "b200.jsonl").read_text(encoding="utf-8").splitlines()
    before = Database(stranger / "shipped").records()
    for old, new in (('"median_ms": ', '"median_ms": 0'), ('"sm_100"', '"sm_90"'), ('"trials": ', '"trials": 1')):
        assert old in lines[0]
        (stranger / "touched.jsonl").write_text("\n".join([lines[0].replace(old, new), *lines[1:]]), encoding="utf-8")
        assert "touched.jsonl:1" in fails_first("db", "import", "touched.jsonl", *SHIPPED)
    assert Database(stranger / "shipped").records() == before


KEPT = {
    "stale": (replace(winner(), provenance=replace(winner().provenance, kernel="0" * 12)), "stale: measured kernels"),
    "there": (anonymous(winner(high=0.5)), "already there"),
    "slower": (winner(high=0.95), "another record of the same calls is preferred"),
}


@pytest.mark.parametrize(("record", "reason"), KEPT.values(), ids=KEPT.keys())
def test_what_is_kept_back(record, reason) -> None:
    """A record that nobody could use is not given, and is told why."""
    found = contribution([record], [anonymous(winner(high=0.5))])
    assert (found.records, found.effects) == ((), ())
    assert found.kept[0].reason.startswith(reason)


@pytest.mark.parametrize("host", ["", "a-host:gpu-1", "z-host:gpu-9"])
def test_a_record_that_they_have_with_a_host_is_not_given_back(host: str) -> None:
    """Whoever begins with a copy of the shipped database gives none of its records, whatever their ids become."""
    shipped = replace(winner(), provenance=replace(winner().provenance, worker=host))
    found = contribution([shipped], [shipped])
    assert (found.records, found.effects) == ((), ())
    assert found.kept == (Superfluous(shipped, "already there"),)


def test_failures_are_given_and_disqualify_winners() -> None:
    """A schedule that failed fails for others, too; a winner of the same kernels is kept back."""
    hung = failed(Reason.HANG)
    found = contribution([winner(), hung], [])
    assert found.records == (anonymous(hung),)
    assert found.effects == ()
    assert found.kept[0].reason == f"its kernels failed: record {anonymous(hung).id}"


def test_what_is_given_says_what_it_changes() -> None:
    """A faster record of calls that another served replaces that; one of another device serves its own."""
    slow, fast = anonymous(winner(Bucket.TWO, high=0.9)), winner(high=0.7)
    other = winner(high=0.6, where=environment(H100))
    found = contribution([fast, other], [slow])
    effects = {effect.record.environment.device: effect for effect in found.effects}
    assert (effects[H200].before.record, effects[H200].before.tier) == (slow, Tier.NEAREST)
    assert (effects[H200].after.record, effects[H200].after.tier) == (anonymous(fast), Tier.EXACT)
    assert (effects[H100].before.tier, effects[H100].after.tier) == (Tier.ARCH, Tier.EXACT)


def test_a_database_is_not_given_to_itself(stranger: Path) -> None:
    """Without --db both would be the shipped one, and nothing in it could be new."""
    assert "--db must be another database" in fails(2, "db", "contribute", "x.jsonl", *SHIPPED, "--to", "shipped")
    assert "--db must be another database" in fails(2, "db", "contribute", "x.jsonl")


def test_the_table(stranger: Path) -> None:
    """For people it names the layer and the GPU, the speed-up, and both records."""
    Database(stranger / "mine").add([winner(high=0.5, seed=4), failed(Reason.WRONG, schedule=winner().schedule, seq=9)])
    Database(stranger / "mine").add([winner(where=environment(H100), high=0.5)])
    text = run("db", "contribute", "out.jsonl", *MINE, "--to", "shipped").stdout
    assert "What merging changes" in text
    assert H100 in text
    assert text.splitlines()[-1].startswith("out.jsonl: 1 winners, 1 failures; 1 kept back")
    lines = (stranger / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["provenance"]["worker"] for line in lines] == ["", ""]
