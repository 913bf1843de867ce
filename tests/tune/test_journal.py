"""Journals: whatever a kill, a full disk or an editor leaves, trials that were on disk are there, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import simulated
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT

from m2gen.db import Failure, Reason, TensorError
from m2gen.errors import TuneError
from m2gen.schedule import Schedule
from m2gen.spec import Objective
from m2gen.tune import journal as module
from m2gen.tune.journal import Journal, decode_trial, encode_trial
from m2gen.tune.space import Subject, enumerate_space
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
HEADER = {"variant": VARIANT.key}


def trial(schedule: Schedule, *, failed: bool = False) -> Trial:
    """Return a trial with something in every field."""
    compiled = Compiled(100, 8, 2048, "abc", seconds=1.5)
    if failed:
        return Trial(schedule, "search", compiled, failure=Failure(Reason.HANG, "took longer than 90 s"), worker="w")
    samples = Samples((1.5, 1.25), (2.5, 2.75), 1 << 30)
    return Trial(schedule, "search", compiled, (TensorError("dq", 1e-4, 2e-4),), samples, None, 0.5, "w", "other")


def test_trials_come_back_as_they_were(tmp_path: Path) -> None:
    """In order, with all that is known; a later trial of a candidate replaces the earlier."""
    written = [trial(point, failed=index % 2 == 1) for index, point in enumerate(POINTS[:4])]
    first = Journal(tmp_path / "j.jsonl", HEADER)
    for each in written:
        first.record(each)
    first.record(trial(POINTS[0], failed=True))
    first.close()
    again = Journal(tmp_path / "j.jsonl", HEADER)
    assert again.trials() == [trial(POINTS[0], failed=True), *written[1:]]
    assert not again.claim(POINTS[1])
    assert again.claim(POINTS[9])


def test_a_trial_is_json(tmp_path: Path) -> None:
    """A written trial can be read by anything that reads JSON."""
    for failed in (False, True):
        text = json.dumps(encode_trial(trial(POINTS[3], failed=failed)), allow_nan=False)
        assert decode_trial(json.loads(text)) == trial(POINTS[3], failed=failed)


@settings(max_examples=60)
@given(cut=st.integers(0, 4000))
def test_a_journal_that_ends_anywhere_keeps_its_whole_lines(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """A torn last line is cut off, and the next trial begins a new line."""
    path = tmp_path_factory.mktemp("torn") / "j.jsonl"
    journal = Journal(path, HEADER)
    for point in POINTS[:3]:
        journal.record(trial(point))
    journal.close()
    whole = path.read_bytes()
    kept = whole[:cut]
    path.write_bytes(kept)
    lines = kept.count(b"\n")
    again = Journal(path, HEADER)
    assert [t.schedule for t in again.trials()] == list(POINTS[: max(0, lines - 1)])
    again.record(trial(POINTS[7]))
    again.close()
    assert [t.schedule for t in Journal(path, HEADER).trials()][-1] == POINTS[7]
    assert path.read_bytes().startswith(whole[: kept.rfind(b"\n") + 1])


@settings(max_examples=60)
@given(line=st.binary(min_size=1, max_size=60).filter(lambda line: b"\n" not in line and line.strip()))
def test_a_line_that_is_no_trial_is_named(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    """By file and number, with what to do; the file stays as it was."""
    path = tmp_path_factory.mktemp("named") / "j.jsonl"
    content = b'{"search": {}}\n' + line + b"\n"
    path.write_bytes(content)
    with pytest.raises(TuneError, match=r"j\.jsonl:2 must be a line of m2gen tune, got .*; --fresh starts anew"):
        Journal(path, HEADER)
    assert path.read_bytes() == content


SLUG = json.dumps(POINTS[0].slug)
SHAPES = ("null", "5", "[1]", '["search"]', '"search"', '{"begun": 5, "machine": ["a", "b"]}', f'{{"begun": {SLUG}}}')
SHAPES += tuple(f'{{"begun": {SLUG}, "machine": {machine}}}' for machine in ("5", "[]", '["a"]', "null"))
SHAPES += ('{"trial": 5}', '{"trial": {}}', '{"trial": null}', "[" * 100_000, '{"other": 1}')


@pytest.mark.parametrize("line", SHAPES, ids=lambda line: line[:30])
def test_a_line_of_another_shape_is_named(tmp_path: Path, line: str) -> None:
    """JSON that no tuner wrote is no trial, and is said before a search begins."""
    path = tmp_path / "j.jsonl"
    path.write_text(f'{{"search": {{}}}}\n{line}\n', encoding="utf-8")
    with pytest.raises(TuneError, match=r"j\.jsonl:2 must be a line of m2gen tune, got .*; --fresh starts anew"):
        Journal(path, HEADER)
    fresh = Journal(path, HEADER, fresh=True)
    assert fresh.trials() == []
    fresh.close()
    assert Journal(path, HEADER).trials() == []


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("place", ["folder", "file/j.jsonl"])
def test_a_journal_that_has_no_place(tmp_path: Path, place: str, fresh: bool) -> None:
    """A folder in the place of the file, or a file in that of the folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(TuneError, match=r"must be writable: .*; M2GEN_CACHE_DIR may name another folder"):
        Journal(tmp_path / place, HEADER, fresh=fresh)


def test_a_full_disk_ends_a_search_and_keeps_its_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that did not fit leaves no part of itself."""
    journal = Journal(tmp_path / "j.jsonl", HEADER)
    journal.record(trial(POINTS[0]))
    before = (tmp_path / "j.jsonl").read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TuneError, match="No space left on device; trials so far are kept; M2GEN_CACHE_DIR may"):
            journal.record(trial(POINTS[1]))
    journal.close()
    assert (tmp_path / "j.jsonl").read_bytes() == before
    assert Journal(tmp_path / "j.jsonl", HEADER).trials() == [trial(POINTS[0])]


def test_a_candidate_that_took_the_machine_down_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun before the last start of this host and never finished; one whose tuner was only killed is free."""
    boot = tmp_path / "boot_id"
    monkeypatch.setattr(module, "BOOT", boot)
    boot.write_text("first", encoding="ascii")
    journal = Journal(tmp_path / "j.jsonl", HEADER)
    journal.begin(POINTS[0])
    journal.begin(POINTS[1])
    journal.record(trial(POINTS[1]))
    journal.close()
    same = Journal(tmp_path / "j.jsonl", HEADER)
    assert [t.schedule for t in same.trials()] == [POINTS[1]]
    assert same.claim(POINTS[0])
    same.close()
    boot.write_text("second", encoding="ascii")
    after = Journal(tmp_path / "j.jsonl", HEADER)
    failures = {t.schedule: t.failure for t in after.trials() if t.failure}
    assert failures == {POINTS[0]: Failure(Reason.CRASH, "the machine went down while this candidate ran")}
    assert not after.claim(POINTS[0])


def test_a_hundred_kills_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """SIGKILL at random points: no trial on disk ever goes, none is made again, and the database stays whole."""
    (tmp_path / "one.yaml").write_text(SPEC, encoding="utf-8")
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = [sys.executable, str(ROOT / "tests" / "fakes" / "kill_tuner.py"), str(SERIES), str(KILLS // SERIES)]
    environment = {**os.environ, "PYTHONPATH": path}
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
