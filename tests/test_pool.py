"""Tasks in processes: one that crashes, hangs or is not to be trusted costs no other."""

from __future__ import annotations

import os
import signal
import time

from m2gen.measure.workers import Lost, Service, run_isolated


def _prepare() -> None:
    os.environ["M2GEN_TEST_PREPARED"] = "yes"


def _serve(task: str) -> str:
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == "exit":
        os._exit(7)
    if task == "hang":
        time.sleep(600)
    return f"{task} {os.environ['M2GEN_TEST_PREPARED']} {os.getpid()}"


def _suspect(result: str) -> bool:
    return result.startswith("bad")


def _lost(task: str, lost: Lost) -> str:
    return f"{task} lost: {lost.reason}"


SERVICE = Service(_serve, _prepare, 3.0, _lost, _suspect)


def test_a_crash_and_a_hang_cost_one_task_each() -> None:
    """The others of their group are done, and every task has one result."""
    groups = [["a", "crash", "b"], ["hang", "c"], ["exit"]]
    results = dict(run_isolated(groups, SERVICE, 2))
    assert results["crash"] == "crash lost: its process ended with SIGSEGV"
    assert results["exit"] == "exit lost: its process ended with exit status 7"
    assert results["hang"] == "hang lost: took longer than 3 s"
    assert {task for task, result in results.items() if " yes " in result} == {"a", "b", "c"}


def test_a_group_has_one_process_until_that_is_suspect() -> None:
    """Tasks of one group share a process, and its compiled kernels; after a bad result they get another."""
    process = {task: result.split()[-1] for task, result in run_isolated([["a", "b", "bad", "c"]], SERVICE, 4)}
    assert process["a"] == process["b"] == process["bad"] != process["c"]


def test_no_tasks() -> None:
    """Nothing to do is done at once."""
    assert list(run_isolated([], SERVICE, 4)) == []
