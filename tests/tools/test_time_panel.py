"""What the panel times on a workload, beside trials that there are, and what its command line takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import ROOT

from m2gen.device import Device
from m2gen.errors import TuneError
from m2gen.schedule import default
from m2gen.spec import Objective
from m2gen.tune.learn import left_out
from m2gen.tune.lessons import Lesson, read
from m2gen.tune.subject import Subject
from m2gen.tune.trial import Compiled, Measurement, Samples
from tools import time_panel
from tools.time_panel import Panel, candidates, parsed


@pytest.fixture(scope="module")
def lessons() -> tuple[Lesson, ...]:
    """Return the lessons of the shipped trials."""
    return read([ROOT / "docs" / "data" / "trials.jsonl"])


def subject(lesson: Lesson, device: Device | None = None) -> Subject:
    """Return the search of a lesson's workload, on its GPU or another."""
    at = lesson.at
    return Subject(at.variant, device or at.device, Objective.TRAIN, at.batch, at.seq)


def test_a_workload_with_trials_gets_what_they_lack(lessons: tuple[Lesson, ...]) -> None:
    """It is the schedule of the rule that is learned without it, where that was not timed."""
    for lesson in lessons[:12]:
        choice = left_out(lessons, lesson)
        missing = [] if choice is None or lesson.ms(choice) is not None else [choice]
        assert candidates(subject(lesson), lessons) == missing


def test_trials_of_another_gpu_stand_for_none(lessons: tuple[Lesson, ...]) -> None:
    """A workload that another GPU has trials of gets the default and the fastest of all, as a new one does."""
    lesson = next(each for each in lessons if not candidates(subject(each), lessons))
    other = replace(lesson.at.device, name="NVIDIA H100 80GB HBM3")
    found = candidates(subject(lesson, other), lessons)
    assert found[0] == default(lesson.at.variant, other)
    assert min(lesson.trials, key=lambda trial: trial.ms).schedule in found


class Worker:
    """A worker process that has its scripted result at once."""

    def __init__(self, result: Any) -> None:
        self.result, self.task = result, None

    def begin(self, task: Any) -> None:
        self.task = task

    def collect(self) -> tuple[Any, Any]:
        task, self.task = self.task, None
        return task, self.result


def timed(
    lesson: Lesson, compiled: Compiled, measured: Measurement, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    """Return what the panel records of a workload's default, with workers that have these results."""
    kept: list[Any] = []
    ledger = SimpleNamespace(record=kept.append, close=lambda: kept.append("closed"))
    monkeypatch.setattr(time_panel, "open_ledger", lambda *_: ledger)
    monkeypatch.setattr(time_panel, "header_of", lambda *_: {})
    monkeypatch.setattr(time_panel, "finished", lambda workers, _: [each for each in workers if each.task])
    compiler, gpu = Worker(compiled), Worker(measured)
    asked = subject(lesson)
    point = default(asked.variant, asked.device)
    busy: Any = property(lambda self: [each for each in (compiler, gpu) if each.task])
    processes = type("Processes", (), {"compilers": [compiler], "gpu": gpu, "busy": busy})()
    panel = Panel({asked: [point]}, folder, SimpleNamespace(worker="host:0"), 600.0)  # type: ignore[arg-type]
    try:
        panel.run(processes)
    except TuneError as error:
        kept.append(str(error))
    return kept


def test_a_full_disk_ends_the_panel(lessons: tuple[Lesson, ...], tmp_path: Path, monkeypatch) -> None:
    """Candidates that a worker could not compile or time for want of space are not recorded as tried."""
    full = "[Errno 28] No space left on device"
    samples = Samples((1.0,), (2.0,), 0)
    (trial, closed) = timed(lessons[0], Compiled(), Measurement(samples=samples), tmp_path, monkeypatch)
    assert (trial.median_ms, closed) == (3.0, "closed")
    for compiled, measured in ((Compiled(stopped=full), Measurement()), (Compiled(), Measurement(stopped=full))):
        kept = timed(lessons[0], compiled, measured, tmp_path, monkeypatch)
        assert kept == ["closed", f"workers must be able to write their files: {full}"]


def test_files_are_specs_or_trials() -> None:
    """A folder, seconds, and files by their endings."""
    found = parsed(["OUT", "250", "h200.yaml", "a.log", "tail.yaml", "b.jsonl"])
    assert found == (Path("OUT"), 250.0, ["h200.yaml", "tail.yaml"], [Path("a.log"), Path("b.jsonl")])


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "required: FOLDER, SECONDS, FILE"),
    (["OUT", "soon", "h200.yaml"], "SECONDS: invalid float value: 'soon'"),
    (["OUT", "9", "h200.yaml", "a.json"], "FILE must end in .yaml, .jsonl or .log, got a.json"),
    (["OUT", "9", "a.log"], "FILE... must have a spec, got a.log"),
])  # fmt: skip
def test_what_is_no_command_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What would be left out without a word is named."""
    with pytest.raises(SystemExit, match="2"):
        parsed(arguments)
    assert said in capsys.readouterr().err
