"""Checks that run on several ranks of one host: each rank a process, gloo between them, a file of results for each."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

Check = Callable[[Any], None]
FOREVER = 3600
"""Seconds, a hundred times what the checks take: only ranks that wait for each other in vain take longer."""


def launch(script: Path, folder: Path, ranks: int) -> dict[str, str]:
    """Run ``script FOLDER RANK RANKS`` on every rank and return what each check said: nothing, or what went wrong.

    One process imports what the script does, which takes longer than most checks, and the ranks are its forks.
    """
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parents[2]), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    cpu = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, "PYTHONPATH": path, **cpu}
    command = [sys.executable, str(here), str(script), str(folder), str(ranks)]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
    try:
        output = process.communicate(timeout=FOREVER)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
    results: dict[str, str] = {}
    for rank in range(ranks):
        place = folder / f"results.{rank}.json"
        found = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
        for name, failure in found.items():
            results[name] = results.get(name, "") + failure
    if process.returncode:
        results["exit"] = f"ranks exited with {process.returncode}: {output}"
    return results


def fork(script: str, folder: str, ranks: int) -> None:
    """Run a script on every rank, each a fork of this process; exit with 1 and name those that fail."""
    runpy.run_path(script)  # not as ``__main__``, so that it imports what it needs and checks nothing yet
    sys.argv = [script, folder, "", str(ranks)]
    processes = []
    for rank in range(ranks):
        processes.append(os.fork())
        if not processes[-1]:
            sys.argv[2] = str(rank)
            runpy.run_path(script, run_name="__main__")
            sys.exit()
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    if any(codes):
        sys.exit(f"ranks exited with {codes}")


def gathered(value: Any) -> list[Any]:
    """Return the value that each rank has; all ranks must call it."""
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def serve(checks: Mapping[str, Check], prepare: Callable[[Path], Any]) -> None:
    """Run checks in this process, one of the ranks, up to the first that fails."""
    folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=FOREVER), rank=rank, world_size=ranks
    )  # fmt: skip
    subject = prepare(folder)
    results = {}
    for name, check in checks.items():
        try:
            check(subject)
            distributed.barrier()
            results[name] = ""
        except Exception:
            results[name] = f"rank {rank}: {traceback.format_exc()}"
        (folder / f"results.{rank}.json").write_text(json.dumps(results), encoding="utf-8")
        if results[name]:
            return  # the ranks are no longer in step; the other one's barrier fails
    distributed.destroy_process_group()


if __name__ == "__main__":
    fork(sys.argv[1], sys.argv[2], int(sys.argv[3]))
