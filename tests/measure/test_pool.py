"""Tasks in processes: one that crashes, hangs or is not to be trusted costs no other."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support import ROOT

from m2gen.measure import workers
from m2gen.measure.workers import Lost, Service, Worker, finished, run_isolated

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


def _never(task: str) -> str:
    while True:
        signal.pause()


def _serve_with_child(task: str) -> str:
    """Start a child that tells a named pipe if it ends by itself, and crash when another pipe is opened."""
    pipe = Path(task)
    with pipe.open("w", encoding="utf-8") as told:
        subprocess.Popen(["sh", "-c", "echo began; sleep 3600; echo ended by itself"], stdout=told)
    pipe.with_name("crash").read_text(encoding="utf-8")
    os.kill(os.getpid(), signal.SIGSEGV)
    return ""


def _serve_and_speak_at_exit(task: str) -> str:
    print("during", file=sys.stderr, flush=True)
    atexit.register(os.write, 2, b"at its end")
    return task


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
    """An hour between two looks at the clock is late for a task that never ends, however soon the looks follow."""
    hours = iter(range(0, 10**9, 3600))
    late = Service(_never, _prepare, 60.0, _lost, now=lambda: float(next(hours)))
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
def test_a_worker_whose_parent_has_gone_ends_quietly(tasks: list[int]) -> None:
    """A parent that stops for another worker's error may close a pipe at any moment."""
    workers._loop(ClosedPipe(tasks), lambda task: task)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which tells a process that its parent has ended")
@pytest.mark.parametrize(("parent", "runs"), [("os.getppid()", "on"), ("os.getpid()", "")], ids=["lives", "is gone"])
def test_a_process_whose_parent_has_gone_before_it_could_ask_ends(parent: str, runs: str) -> None:
    """Whoever has another parent than the one that started it, by the time it asks Linux, ends at once."""
    code = f"import os; from m2gen.measure.workers import end_with_parent; end_with_parent({parent}); print('on')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == (runs, 0 if runs else 1)


@pytest.mark.parametrize("crashes", [False, True])
def test_the_children_of_a_worker_end_with_it(tmp_path: Path, crashes: bool) -> None:
    """An assembler that never ends does not outlive the worker that called it, whether that is stopped or crashes."""
    for name in ("told", "crash"):
        os.mkfifo(tmp_path / name)
    worker = Worker(Service(_serve_with_child, _prepare, 600.0, _lost, now=lambda: 0.0))
    worker.begin(str(tmp_path / "told"))
    with (tmp_path / "told").open(encoding="utf-8") as told:
        assert told.readline() == "began\n"
        if crashes:
            (tmp_path / "crash").write_text("now", encoding="utf-8")
            while not finished([worker]):
                pass
            assert worker.collect()[1].endswith("lost: its process ended with SIGSEGV")
        else:
            worker.stop()
        assert told.read() == ""


def test_a_worker_is_quiet_at_its_end(capfd: pytest.CaptureFixture[str]) -> None:
    """What a task prints is seen; what its libraries print as they are unloaded is not."""
    service = Service(_serve_and_speak_at_exit, _prepare, 600.0, _lost, now=lambda: 0.0)
    assert dict(run_isolated([["a"]], service, 1)) == {"a": "a"}
    assert capfd.readouterr().err == "during\n"


INTERRUPTED = """
import time
from m2gen.measure.workers import Service, Worker

if __name__ == "__main__":
    worker = Worker(Service(time.sleep, print, 60.0, lambda task, lost: lost))
    worker.begin(5)
    try:
        print("begun", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(1)
        worker.stop()
"""


def test_ctrl_c_while_a_worker_starts(tmp_path: Path) -> None:
    """A terminal interrupts the whole group; a worker that is still importing does not show where it was."""
    (tmp_path / "main.py").write_text(INTERRUPTED, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "main.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=1800)[1] == ""
