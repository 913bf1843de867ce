"""Tasks in processes: one that crashes, hangs or is not to be trusted costs no other."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from m2gen.measure import workers
from m2gen.measure.workers import Lost, Service, run_isolated

HANGING = "M2GEN_TEST_HANGING"
"""Names the file in which tasks that hang say so."""
SECONDS = 0.5


def _prepare() -> None:
    os.environ["M2GEN_TEST_PREPARED"] = "yes"


def _serve(task: str) -> str:
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == "exit":
        os._exit(7)
    if task == "hang":
        with open(os.environ[HANGING], "a", encoding="utf-8") as stream:
            stream.write("hangs\n")
        time.sleep(1e6)
    return f"{task} {os.environ['M2GEN_TEST_PREPARED']} {os.getpid()}"


def _suspect(result: str) -> bool:
    return result.startswith("bad")


def _lost(task: str, lost: Lost) -> str:
    return f"{task} lost: {lost.reason}"


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service[str, str]:
    """Return a service by whose clock a task is out of time once it hangs, however long processes take to start."""
    log = tmp_path / "hanging"
    log.touch()
    monkeypatch.setenv(HANGING, str(log))
    return Service(
        _serve,
        _prepare,
        SECONDS,
        _lost,
        _suspect,
        lambda: 2 * SECONDS * len(log.read_text(encoding="utf-8").splitlines()),
    )


def test_a_crash_and_a_hang_cost_one_task_each(service: Service[str, str]) -> None:
    """The others of their group are done, and every task has one result."""
    groups = [["a", "crash", "b"], ["hang", "c"], ["exit"]]
    results = dict(run_isolated(groups, service, 1))
    assert results["crash"] == "crash lost: its process ended with SIGSEGV"
    assert results["exit"] == "exit lost: its process ended with exit status 7"
    assert results["hang"] == "hang lost: took longer than 0.5 s"
    assert {task for task, result in results.items() if " yes " in result} == {"a", "b", "c"}


def test_a_group_has_one_process_until_that_is_suspect(service: Service[str, str]) -> None:
    """Tasks of one group share a process, and its compiled kernels; after a bad result they get another."""
    process = {task: result.split()[-1] for task, result in run_isolated([["a", "b", "bad", "c"]], service, 4)}
    assert process["a"] == process["b"] == process["bad"] != process["c"]


def test_groups_run_side_by_side(service: Service[str, str]) -> None:
    """As many groups run at once as there are processes."""
    never = replace(service, now=lambda: 0.0)
    results = dict(run_isolated([["a", "crash"], ["b"], ["c", "d"]], never, 2))
    assert results["crash"] == "crash lost: its process ended with SIGSEGV"
    process = {task: result.split()[-1] for task, result in results.items()}
    assert process["c"] == process["d"]
    assert len({process["a"], process["b"]}) == 2


def test_a_clock_of_its_own_says_when_a_task_is_late() -> None:
    """An hour between two looks at the clock is late whatever the task does; no time at all is never late."""
    hours = iter(range(0, 10**9, 3600))
    late = Service(_serve, _prepare, 60.0, _lost, now=lambda: float(next(hours)))
    assert dict(run_isolated([["a"]], late, 1)) == {"a": "a lost: took longer than 60 s"}


def test_no_tasks(service: Service[str, str]) -> None:
    """Nothing to do is done at once."""
    assert list(run_isolated([], service, 4)) == []


class ClosedPipe:
    """A pipe whose other end is gone: before a task is read, or before its result is."""

    def __init__(self, tasks: list[int]) -> None:
        self.tasks = tasks

    def recv(self) -> int:
        if not self.tasks:
            raise ConnectionResetError(104, "Connection reset by peer")
        return self.tasks.pop()

    def send(self, result: int) -> None:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("tasks", [[], [1]])
def test_a_worker_whose_parent_has_gone_ends_quietly(tasks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent that stops for another worker's error may close a pipe at any moment."""
    monkeypatch.setattr(workers.signal, "signal", lambda *_: None)
    monkeypatch.setattr(workers, "_end_with_parent", lambda: None)
    workers._loop(ClosedPipe(tasks), lambda: None, lambda task: task)
