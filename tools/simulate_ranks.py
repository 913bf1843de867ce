"""Run every form of a layer over many gloo ranks of this host's CPUs, at tiny sizes: is each one right?

python tools/simulate_ranks.py --ranks 64 --out docs/data/ranks_64_cpus.json

Checks what ``m2gen bench --gpus 64`` checks where there is no GPU, and times nothing. Ranks are forks of one process,
which has imported torch: they need less memory, and begin sooner. Ends with 1 if any result is wrong.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from m2gen import pipeline
from m2gen.bench.ranks.entries import RankDocument, RankJob, read, write
from m2gen.bench.ranks.kinds import Form
from m2gen.bench.ranks.launch import CPU, error_file
from m2gen.cli.show.ranks import run_ranks
from m2gen.cli.show.report import Display
from m2gen.errors import RanksError
from m2gen.pipeline import RanksRequest
from m2gen.pipeline.ranks import LOOPBACK

POLL_SECONDS = 0.2


def simulated(job: RankJob, folder: Path) -> RankDocument:
    """Return the results of a job whose ranks are forks of this process; raises RanksError for a rank that fails."""
    from m2gen.bench.ranks import worker  # imported once, before the forks that have it

    write(folder / "job.json", job)
    gc.freeze()  # or collections would touch, and so copy, what forks share
    ranks = {_fork(worker.main, folder, rank): rank for rank in range(job.ranks)}
    seconds = job.quiet_seconds * len(job.cases)
    end = time.monotonic() + seconds
    try:
        while ranks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in ranks:
                rank = ranks.pop(pid)
                if status:
                    raise RanksError(f"rank {rank} of {job.ranks} {_ended(status, error_file(folder, rank))}")
            elif time.monotonic() > end:
                late = ", ".join(map(str, sorted(ranks.values())))
                raise RanksError(f"ranks must be done within {seconds:g} s, got none of rank {late}")
            else:
                time.sleep(POLL_SECONDS)
    finally:
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return read(folder / "results.json", RankDocument)


def _fork(main: object, folder: Path, rank: int) -> int:
    pid = os.fork()
    return pid or _serve(main, folder, rank)


def _serve(main: object, folder: Path, rank: int) -> NoReturn:
    output = os.open(folder / f"output.{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    assert callable(main)
    main(folder, rank)
    os._exit(1)  # not reached: a rank ends its process


def _ended(status: int, error: Path) -> str:
    if error.is_file():
        return f"failed: {error.read_text(encoding='utf-8')}"
    code = os.waitstatus_to_exitcode(status)
    return f"ended with {signal.Signals(-code).name if code < 0 else f'status {code}'}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--spec", default="tiny.yaml")
    parser.add_argument("--layer", default="base", help="its heads are rounded up to what the ranks share")
    parser.add_argument("--form", action="append", type=Form, help="may be repeated; all if not given")
    parser.add_argument("--out", type=Path, help="a file for the results as JSON")
    given = parser.parse_args(arguments)
    os.environ.update({**CPU, **LOOPBACK})
    request = RanksRequest(given.ranks, (given.layer,), forms=tuple(given.form or Form))
    job = pipeline.ranks_job(pipeline.plan(given.spec, None, ()), request, (), cuda=False)
    job = replace(job, cases=tuple(case for case in job.cases if case.form is not Form.ONE), repeats=0)
    with tempfile.TemporaryDirectory(prefix="m2gen-ranks-") as name:
        status = run_ranks([simulated(job, Path(name))], Display(), given.out)
    sys.exit(status)


if __name__ == "__main__":
    main()
