"""Many ranks as forks of one process: their results, and what is said of one that fails or is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

TOOL = [sys.executable, str(ROOT / "tools" / "simulate_ranks.py"), "--ranks", "4"]


def simulated(*arguments: str, start: str = "") -> subprocess.CompletedProcess[str]:
    """Run the tool, after some code in its process, in an environment that has not imported triton."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = f"import runpy, sys; sys.argv = sys.argv[1:]; {start}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, *TOOL[1:], *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_forks_agree_with_one_rank(tmp_path: Path) -> None:
    """The document of a run has every form, within its budget."""
    path = tmp_path / "four.json"
    done = simulated("--form", "exchange", "--form", "heads", "--out", str(path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [row["form"] for row in rows] == ["heads", "exchange"]
    assert all(0 < row["worst"] <= 1 for row in rows)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which lists the threads of a process")
def test_ranks_are_forks_of_one_thread(tmp_path: Path) -> None:
    """No thread of numpy or torch, which forks would lack but believe in, is there when ranks begin."""
    start = f"""
import os
fork = os.fork
def forked():
    with open({str(tmp_path / "threads")!r}, "a") as file:
        print(len(os.listdir("/proc/self/task")), "numpy" in sys.modules, file=file)
    return fork()
os.fork = forked
"""
    done = simulated("--form", "heads", start=start)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "threads").read_text(encoding="utf-8") == "1 True\n" * 4


def test_a_fork_that_is_killed_is_named() -> None:
    """A rank that dies ends the run with its number, whatever the others do."""
    start = """
import os, signal
from m2gen.bench.ranks import worker
whole = worker.main
worker.main = lambda folder, rank: os.kill(os.getpid(), signal.SIGKILL) if rank == 2 else whole(folder, rank)
"""
    done = simulated("--form", "exchange", start=start)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("simulate_ranks: rank 2 of 4 ended with SIGKILL")


def test_a_fork_that_is_killed_is_named_though_others_are_seen_first() -> None:
    """The killed one of ranks that have all ended is to blame, not those before it that say that it is gone."""
    start = """
import os, signal
from m2gen.bench.ranks import worker
from m2gen.bench.ranks.launch import write_error
def main(folder, rank):
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write_error(folder, rank, "RuntimeError: connection closed by peer")
    os._exit(1)
worker.main = main
fork, wait, ranks = os.fork, os.waitpid, []
def forked():
    pid = fork()
    ranks.append(pid)
    return pid
def waited(pid, options):
    while ranks:
        os.waitid(os.P_PID, ranks.pop(), os.WEXITED | os.WNOWAIT)
    return wait(pid, options)
os.fork, os.waitpid = forked, waited
"""
    done = simulated("--form", "exchange", start=start)
    assert done.stderr.splitlines()[-1].startswith("simulate_ranks: rank 2 of 4 ended with SIGKILL")


@pytest.mark.parametrize(("arguments", "said"), [
    (("--layer", "none"), "simulate_ranks: --layer must be among base, grouped, got 'none'"),
    (("--ranks", "1"), "error: --ranks must be at least 2, got 1"),
    (("--out", "none/here.json"), "--out none/here.json must be writable: No such file or directory"),
])  # fmt: skip
def test_what_cannot_be_run_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    """It is said before any rank begins."""
    done = simulated(*arguments, start="import os; os.fork = None")
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
