"""Files that commands write beside what they print: whole or not at all, and looked at before the work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command_line import TINY, fails, outcome, run

from m2gen import pipeline
from m2gen.cli.show.report import write_json


@pytest.mark.parametrize(
    ("place", "reason"), [("absent/report.xml", "No such file"), (".", "Is a directory"), ("/dev/null/x", "Not a dir")]
)
def test_a_junit_file_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, reason: str
) -> None:
    """A report that has nowhere to go is an error in one line, before anything is verified."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "verify", None)
    line = fails(2, "verify", "--spec", TINY, "--quiet", "--junit", place)
    assert line.startswith(f"m2gen: --junit {place} must be writable: {reason}")
    assert list(tmp_path.iterdir()) == []


def test_a_junit_file_that_cannot_be_written_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results are shown all the same, and what was there is whole."""
    (tmp_path / "report.xml").write_text("old", encoding="utf-8")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "verify", lambda *_: outcome(1e-4))
    monkeypatch.setattr(os, "replace", refuse)
    result = run("verify", "--spec", TINY, "--quiet", "--junit", str(tmp_path / "report.xml"))
    assert result.exit_code == 1
    assert result.stdout == "1 case, 1 tensor, 0 over budget, 0 without results, 0.5 s\n"
    assert result.stderr.endswith("report.xml must be writable: No space left on device\n")
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["old"]


def test_a_document_leaves_other_files_alone(tmp_path: Path) -> None:
    """What is staged has a name of its own: ``run.json.new`` may be somebody's."""
    (tmp_path / "run.json.new").write_text("mine", encoding="utf-8")
    write_json({"a": 1}, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"a": 1}
    assert (tmp_path / "run.json.new").read_text(encoding="utf-8") == "mine"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "command",
    [
        ("bench", "--spec", TINY, "--out", "absent/file"),
        ("bench", "--spec", TINY, "--plot", "absent/file.svg"),
        ("tune", "--spec", TINY, "--report", "absent/file"),
        ("db", "learn", "trials.jsonl", "--rule", "absent/file"),
        ("db", "learn", "trials.jsonl", "--trials", "absent/file"),
    ],
    ids=lambda command: " ".join((command[0], command[-2])),
)
def test_every_file_is_looked_at_before_the_work(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that cannot be written is an error before a GPU is looked for, or a long file is read."""
    monkeypatch.chdir(tmp_path)
    *_, option, place = command
    assert fails(2, *command) == f"m2gen: {option} {place} must be writable: No such file or directory"
