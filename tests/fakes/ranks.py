"""Checks that run on several ranks of one host: each rank a process, gloo between them, a file of results for each."""

from __future__ import annotations

import json
import os
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
    """Run ``script FOLDER RANK RANKS`` on every rank and return what each check said: nothing, or what went wrong."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here.parents[1]), str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    cpu = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, "PYTHONPATH": path, **cpu}
    commands = [[sys.executable, str(script), str(folder), str(rank), str(ranks)] for rank in range(ranks)]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        said = [process.communicate(timeout=FOREVER)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    results: dict[str, str] = {}
    for rank, output in enumerate(said):
        place = folder / f"results.{rank}.json"
        found = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
        for name, failure in found.items():
            results[name] = results.get(name, "") + failure
        if processes[rank].returncode:
            results["exit"] = f"rank {rank} exited with {processes[rank].returncode}: {output}"
    return results


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
