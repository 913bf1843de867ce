"""Ledgers in journals: whatever a kill, a full disk or an editor leaves, trials on disk are there, once."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import simulated
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from support import ROOT

from m2gen.db import Failure, Reason, TensorError
from m2gen.errors import TuneError
from m2gen.schedule import Schedule
from m2gen.spec import Objective
from m2gen.tune import claim
from m2gen.tune.entries import Entries
from m2gen.tune.ledger import Ledger, open_ledger
from m2gen.tune.space import Subject, enumerate_space
from m2gen.tune.study import RESULT, decode_trial, encode_trial, read_journal
from m2gen.tune.trial import Compiled, Samples, Trial
from m2gen.variant import parse_variant

KILLS, SERIES = 100, 5
SPEC = """schema: 1
name: one
targets: sm_90
layers:
  base:
    head_dim: 16
    state_expansion: 16
    heads: {q: 1, k: 1, v: 4, f: 4, w: 4}
    dtypes: bf16
    workloads: [{batch: 8, seq: 256}]
"""
VARIANT = parse_variant("k16_v16_q1_k1_v4_f4_w4_bf16_carry_approx")
POINTS = enumerate_space(Subject(VARIANT, simulated.DEVICE, Objective.TRAIN, 8, 256)).points
HEADER = {"variant": VARIANT.key, "study": "one"}


def trial(schedule: Schedule, *, failed: bool = False) -> Trial:
    """Return a trial with something in every field."""
    compiled = Compiled(100, 8, 2048, "abc", seconds=1.5)
    if failed:
        return Trial(schedule, "search", compiled, failure=Failure(Reason.HANG, "took longer than 90 s"), worker="w")
    samples = Samples((1.5, 1.25), (2.5, 2.75), 1 << 30)
    return Trial(schedule, "search", compiled, (TensorError("dq", 1e-4, 2e-4),), samples, None, 0.5, "w", "other")


def ledger(path: Path, worker: str = "host:0", **options: bool) -> Ledger:
    """Open the ledger of a journal."""
    return open_ledger(path, HEADER, worker, **options)


def optunas(path: Path) -> list[Any]:
    """Return the trials of a journal as Optuna has them."""
    storage = JournalStorage(JournalFileBackend(str(path)))
    (study,) = storage.get_all_studies()
    assert study.user_attrs == {"search": HEADER}
    return storage.get_all_trials(study._study_id)


class Clock(datetime):
    """A clock by which every look is a second later, or earlier, than the one before."""

    step = timedelta(seconds=1)
    seen = datetime(2026, 1, 1, 12, tzinfo=UTC)

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        """Return the date, as the host's or in a zone."""
        cls.seen += cls.step
        return cls.seen.astimezone(tz).replace(tzinfo=tz)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    """Have Optuna date trials by a clock that goes on by a second a look."""
    monkeypatch.setattr(Clock, "step", Clock.step)
    monkeypatch.setattr(Clock, "seen", Clock.seen)
    monkeypatch.setattr("optuna.storages.journal._storage.datetime", Clock)
    monkeypatch.setattr("optuna.trial._frozen.datetime", SimpleNamespace(datetime=Clock))
    return Clock


def test_a_clock_that_is_set_back_reverses_no_candidates_trials(tmp_path: Path, clock: type[Clock]) -> None:
    """A candidate that failed after it had passed has failed, whatever the dates of its trials."""
    path = tmp_path / "j.log"
    one = ledger(path)
    for point in POINTS[:2]:
        assert one.claim(point)
        one.record(trial(point))
    clock.step = -timedelta(hours=1)
    one.record(trial(POINTS[1], failed=True))
    passed, failed = optunas(path)[1:]
    assert (failed.number, failed.datetime_complete < passed.datetime_complete) == (2, True)
    ((_, trials),) = read_journal(path)
    assert trials == ledger(path).trials() == [trial(POINTS[0]), trial(POINTS[1]), trial(POINTS[1], failed=True)]


@pytest.mark.usefixtures("clock")
def test_trials_come_back_as_they_were(tmp_path: Path) -> None:
    """In order, with all that is known; a later trial of a candidate counts in the place of the earlier."""
    written = [trial(point, failed=index % 2 == 1) for index, point in enumerate(POINTS[:4])]
    first = ledger(tmp_path / "j.log")
    for each in reversed(written):
        assert first.claim(each.schedule)
    for each in written:
        first.record(each)
    first.record(trial(POINTS[0], failed=True))
    first.close()
    again = ledger(tmp_path / "j.log")
    assert again.trials() == [*written, trial(POINTS[0], failed=True)]
    assert not again.claim(POINTS[1])
    assert again.claim(POINTS[9])


def test_optuna_has_what_people_look_at(tmp_path: Path) -> None:
    """Times, states, and knobs by the names and values that they have elsewhere."""
    path = tmp_path / "j.log"
    one = ledger(path)
    for each in (trial(POINTS[0]), trial(POINTS[1], failed=True)):
        assert one.claim(each.schedule)
        one.record(each)
    assert one.claim(POINTS[2])
    passed, failed, running = optunas(path)
    assert [passed.state.name, failed.state.name, running.state.name] == ["COMPLETE", "FAIL", "RUNNING"]
    assert passed.value == trial(POINTS[0]).median_ms
    assert passed.user_attrs["schedule"] == POINTS[0].slug
    assert passed.params["forward.rows"] == POINTS[0].forward.rows
    assert passed.params["family"] == POINTS[0].family.value
    assert passed.params["tanh"] == POINTS[0].tanh.value


def test_a_trial_is_json(tmp_path: Path) -> None:
    """A written trial can be read by anything that reads JSON."""
    for failed in (False, True):
        text = json.dumps(encode_trial(trial(POINTS[3], failed=failed)), allow_nan=False)
        assert decode_trial(json.loads(text)) == trial(POINTS[3], failed=failed)


@settings(max_examples=40)
@given(cut=st.integers(0, 20000))
def test_a_journal_that_ends_anywhere_keeps_its_whole_lines(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """A torn last line is cut off, and what follows begins a new line."""
    path = tmp_path_factory.mktemp("torn") / "j.log"
    first = ledger(path)
    for point in POINTS[:3]:
        assert first.claim(point)
        first.record(trial(point))
    first.close()
    whole = path.read_bytes()
    kept = whole[: cut % (len(whole) + 1)]
    path.write_bytes(kept)
    lines = kept[: kept.rfind(b"\n") + 1]
    results = lines.count(b'"user_attr":{"m2gen"')
    again = ledger(path)
    assert [t.schedule for t in again.trials()] == list(POINTS[:results])
    assert again.claim(POINTS[7])
    again.record(trial(POINTS[7]))
    again.close()
    assert ledger(path).trials()[-1] == trial(POINTS[7])
    assert path.read_bytes().startswith(lines)


def test_a_line_is_cut_off_while_others_write(tmp_path: Path) -> None:
    """A worker that is killed within a line costs another, which goes on, nothing."""
    path = tmp_path / "j.log"
    one = ledger(path)
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"op_code":4,"worker_id":"gone","stu')
    assert one.claim(POINTS[0])
    one.record(trial(POINTS[0]))
    assert ledger(path).trials() == [trial(POINTS[0])]


@settings(max_examples=40)
@given(line=st.binary(min_size=1, max_size=60).filter(lambda line: b"\n" not in line and line.strip()))
def test_a_line_that_is_no_trial_is_named(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    """By file and number, with what to do; the file stays as it was."""
    path = tmp_path_factory.mktemp("named") / "j.log"
    ledger(path).close()
    content = path.read_bytes().split(b"\n")[0] + b"\n" + line + b"\n"
    path.write_bytes(content)
    with pytest.raises(TuneError, match=r"j\.log:2 must be a line of Optuna's journal, got .*; --fresh starts anew"):
        ledger(path)
    assert path.read_bytes() == content


LINES = ("null", "5", "[1]", '"search"', "{}", '{"op_code": "x"}', "[" * 100_000, '{"trial": 5}')
LOGS = ('{"op_code": 0}', '{"op_code": 77, "worker_id": "w"}', '{"op_code": 4, "worker_id": "w", "study_id": 0}')


@pytest.mark.parametrize("line", [*LINES, *LOGS], ids=lambda line: line[:30])
def test_a_line_of_another_shape_is_named(tmp_path: Path, line: str) -> None:
    """JSON that no tuner wrote is no trial, and is said before a search begins."""
    path = tmp_path / "j.log"
    ledger(path).close()
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"{line}\n")
    with pytest.raises(TuneError, match=r"j\.log(:\d)? must be a .* of Optuna's.*, got .*; --fresh starts anew"):
        ledger(path)
    fresh = ledger(path, fresh=True)
    assert fresh.trials() == []
    fresh.close()
    assert ledger(path).trials() == []


def test_a_trial_of_another_shape_is_named(tmp_path: Path) -> None:
    """A trial that cannot be read, such as one of another m2gen, is an error that says what to do."""
    path = tmp_path / "j.log"
    one = ledger(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2gen.tune.ledger.encode_trial", lambda trial: {"schedule": 5})
        one.record(trial(POINTS[0]))
    with pytest.raises(
        TuneError, match=r"j\.log: trial 0 of study one must be one that this m2gen reads; --fresh starts"
    ):
        ledger(path).trials()


@pytest.mark.parametrize("attributes", [{"claim": {"worker": 5}}, {"claim": []}, {"schedule": "none"}, {"schedule": 5}])
def test_a_claim_of_another_shape_is_named(tmp_path: Path, attributes: dict[str, Any]) -> None:
    """What somebody wrote into a trial that is nobody's any more is an error that says where, and what to do."""
    path = tmp_path / "j.log"
    one = ledger(path)
    assert one.claim(POINTS[0])
    if "schedule" in attributes:
        one.release(POINTS[0])
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if "claim" in line.get("user_attrs", {}):
            line["user_attrs"] |= attributes
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(
        TuneError, match=r"j\.log: trial 0 of study one must be one that this m2gen reads; --fresh starts"
    ):
        ledger(path, "other").adopt()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("place", ["folder", "file/j.log"])
def test_a_journal_that_has_no_place(tmp_path: Path, place: str, fresh: bool) -> None:
    """A folder in the place of the file, or a file in that of the folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(TuneError, match=r"must be writable: .*; M2GEN_CACHE_DIR may name another folder"):
        ledger(tmp_path / place, fresh=fresh)


def test_a_full_disk_ends_a_search_and_keeps_its_trials(tmp_path: Path) -> None:
    """A limit on the size of files simulates it: the line that did not fit leaves no part of itself."""
    path = tmp_path / "j.log"
    one = ledger(path)
    assert one.claim(POINTS[0])
    one.record(trial(POINTS[0]))
    assert one.claim(POINTS[1])
    before = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
    try:
        with pytest.raises(TuneError, match="File too large; trials so far are kept; M2GEN_CACHE_DIR may"):
            one.record(trial(POINTS[1]))
        one.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert ledger(path).trials() == [trial(POINTS[0])]


GONE = """
import os, signal, sys
from pathlib import Path
from m2gen.schedule import parse
from m2gen.tune.ledger import open_ledger
ledger = open_ledger(Path(sys.argv[1]), {"study": "one"}, "host:9")
for slug in sys.argv[2:]:
    assert ledger.claim(parse(slug))
    ledger.begin(parse(slug))
print("claimed", flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_gone_has_nothing(tmp_path: Path) -> None:
    """While it lives its candidates are its own; then others try them, by Optuna's handling of stale trials."""
    path = tmp_path / "j.log"
    one = ledger(path)
    command = [sys.executable, "-c", GONE, str(path), POINTS[0].slug]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        assert not one.claim(POINTS[0])
        assert (one.adopt(), one.pending()) == ([], 1)
        other.communicate("")
    assert (one.adopt(), one.pending()) == ([POINTS[0]], 0)
    assert [t.state.name for t in optunas(path)] == ["FAIL", "RUNNING"]
    one.record(trial(POINTS[0]))
    assert ledger(path).trials() == [trial(POINTS[0])]


def test_a_process_of_another_container_is_not_known_to_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number says nothing where processes have numbers of their own: its candidates are its own until a reboot."""
    other, boot = tmp_path / "other", tmp_path / "boot"
    other.symlink_to("pid:[4026532000]")
    boot.write_text("first", encoding="ascii")
    monkeypatch.setattr(claim, "BOOT", boot)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claim, "PROCESSES", other)
        there = ledger(tmp_path / "j.log", "there")
        assert there.claim(POINTS[0])
    monkeypatch.setattr(claim, "alive", lambda pid: False)
    here = ledger(tmp_path / "j.log", "here")
    assert (here.adopt(), here.pending()) == ([], 1)
    boot.write_text("second", encoding="ascii")
    assert ledger(tmp_path / "j.log", "after").adopt() == [POINTS[0]]


def test_what_is_given_up_waits(tmp_path: Path) -> None:
    """Whoever asks next has it, once; it is not tried anew beside."""
    path = tmp_path / "j.log"
    one, two, three = (ledger(path, name) for name in ("one", "two", "three"))
    for point in POINTS[:2]:
        assert one.claim(point)
    one.release(POINTS[0])
    one.close()
    assert two.claim(POINTS[0])
    assert (two.adopt(), three.adopt()) == ([POINTS[1]], [])
    assert len(optunas(path)) == 2


def test_a_result_without_an_end_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that died between the result and the end of its trial: nobody makes it again."""
    path = tmp_path / "j.log"
    dead = ledger(path)
    assert dead.claim(POINTS[0])
    monkeypatch.setattr(dead, "_ended", lambda *_: True)
    dead.record(trial(POINTS[0]))
    assert [t.state.name for t in optunas(path)] == ["RUNNING"]
    again = ledger(path)
    assert again.trials() == [trial(POINTS[0])]
    assert [t.state.name for t in optunas(path)] == ["COMPLETE"]
    assert not again.claim(POINTS[0])


def test_a_claim_that_was_taken_back_loses_no_result(tmp_path: Path) -> None:
    """A worker that was silent for too long and yet goes on: its result counts, and the other's claim ends."""
    path = tmp_path / "j.log"
    one, two = ledger(path, "one"), ledger(path, "two")
    assert one.claim(POINTS[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claim, "alive", lambda pid: False)
        assert two.adopt() == [POINTS[0]]
    one.record(trial(POINTS[0]))
    two.record(trial(POINTS[0], failed=True))
    assert Counter(t.schedule for t in ledger(path).trials()) == {POINTS[0]: 2}


def test_a_search_that_another_tuner_began_anew_ends(tmp_path: Path) -> None:
    """Its trials are gone, and what it goes on to do must not be taken for the new one's."""
    path = tmp_path / "j.log"
    one = ledger(path, "one")
    assert one.claim(POINTS[0])
    two = ledger(path, "two", fresh=True)
    with pytest.raises(TuneError, match=r"j\.log must keep the search while it goes on: another tuner began anew"):
        one.claim(POINTS[1])
    one.close()
    assert (two.trials(), two.pending()) == ([], 0)


def test_of_two_claims_the_first_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that ask at the same time, when neither sees the other's claim."""
    path = tmp_path / "j.log"
    one, two = ledger(path, "one"), ledger(path, "two")
    real = Entries.of
    with monkeypatch.context() as patch:
        looks = iter([lambda *_: [], real])
        patch.setattr(Entries, "of", lambda self, schedule: next(looks)(self, schedule))
        assert one.claim(POINTS[0])
        looks = iter([lambda *_: [], real])
        assert not two.claim(POINTS[0])
    assert [t.state.name for t in optunas(path)] == ["RUNNING", "FAIL"]
    one.record(trial(POINTS[0]))
    assert all(RESULT not in t.user_attrs for t in optunas(path)[1:])


@pytest.mark.parametrize("storage", ["journal", "database"])
def test_a_candidate_that_took_the_machine_down_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    """Begun before the last start of this host and never finished; one that had not reached the GPU is free."""
    boot, data = tmp_path / "boot_id", tmp_path / "x.db"
    place = tmp_path / "j.log" if storage == "journal" else f"sqlite:///{data}"
    monkeypatch.setattr(claim, "BOOT", boot)
    boot.write_text("first", encoding="ascii")
    before = open_ledger(place, HEADER, "host:0")
    for point in POINTS[:3]:
        assert before.claim(point)
    before.begin(POINTS[0])
    before.begin(POINTS[1])
    before.record(trial(POINTS[1]))
    boot.write_text("second", encoding="ascii")
    if storage == "database":
        with closing(sqlite3.connect(data)) as known, known:
            known.execute("UPDATE trial_heartbeats SET heartbeat = '2026-01-01 00:00:00'")
    after = open_ledger(place, HEADER, "host:0")
    failures = {t.schedule: t.failure for t in after.trials() if t.failure}
    assert failures == {POINTS[0]: Failure(Reason.CRASH, "the machine went down while this candidate ran")}
    assert not after.claim(POINTS[0])
    assert after.adopt() == [POINTS[2]]


def test_a_hundred_kills_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """SIGKILL at random points: no trial on disk ever goes, none is made again, and the database stays whole."""
    (tmp_path / "one.yaml").write_text(SPEC, encoding="utf-8")
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = [sys.executable, str(ROOT / "tests" / "fakes" / "kill_tuner.py"), str(SERIES), str(KILLS // SERIES)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}  # forks have none of numpy's threads
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    every = json.loads(done.stdout)
    assert sum(len(states) - 1 for states in every) == KILLS
    interrupted = 0
    for states in every:
        interrupted += sum(0 < len(state["recorded"]) < len(states[-1]["recorded"]) for state in states)
        _check(states)
    assert interrupted > KILLS // 10, "kills must come in the middle of searches, too"


def _check(states: list[dict[str, Any]]) -> None:
    """Hold a series to its promises."""
    for before, after in pairwise(states):
        assert after["recorded"][: len(before["recorded"])] == before["recorded"], "a trial was lost"
        assert len(after["records"]) >= len(before["records"]), "a record was lost"
        new = after["log"][len(before["log"]) :]
        again = {line.split()[1] for line in new if line.startswith(("screen", "compile"))} & set(before["recorded"])
        assert not again, "a trial was repeated"
    assert all(state["faults"] == [] for state in states)
    last = states[-1]
    assert len(last["recorded"]) == len(set(last["recorded"])) == 40
    screened = Counter(line for line in last["log"] if line.startswith("screen"))
    assert sum(screened.values()) <= 40 + len(states), "a kill costs the candidate that was running"
    assert len(last["records"]) == 1
