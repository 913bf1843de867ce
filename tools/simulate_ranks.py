"""Run every form of a layer over many gloo ranks of this host's CPUs, at tiny sizes: is each one right?

python tools/simulate_ranks.py --ranks 64 --out docs/data/ranks_64_cpus.json

Checks what ``m2gen bench --gpus 64`` checks where there is no GPU, and times nothing. Ranks are forks of one process,
which has imported torch: they need less memory, and begin sooner. It has one thread, since a fork has no other: numpy
and torch are imported after the variables that tell them to start none. Ends with 1 if any result is wrong.
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

from m2gen.bench.ranks.entries import RankDocument, RankJob, read, write
from m2gen.bench.ranks.kinds import Form
from m2gen.bench.ranks.launch import CPU, LOOPBACK, failure
from m2gen.errors import M2genError, RanksError
from m2gen.measure.workers import end_with_parent

POLL_SECONDS = 0.2


def simulated(job: RankJob, folder: Path) -> RankDocument:
    """Return the results of a job whose ranks are forks of this process; raises RanksError for a rank that fails."""
    from m2gen.bench.ranks import worker  # imported once, before the forks that have it

    write(folder / "job.json", job)
    gc.freeze()  # or collections would touch, and so copy, what forks share
    ranks = [_Fork(worker.main, folder, rank) for rank in range(job.ranks)]
    seconds = job.quiet_seconds * len(job.cases)
    end = time.monotonic() + seconds
    try:
        while None in (states := [rank.poll() for rank in ranks]) or any(states):
            if any(states):
                raise RanksError(failure(ranks, folder))
            if time.monotonic() > end:
                late = ", ".join(str(rank) for rank, status in enumerate(states) if status is None)
                raise RanksError(f"ranks must be done within {seconds:g} s, got none of rank {late}")
            time.sleep(POLL_SECONDS)
    finally:
        for rank in ranks:
            rank.stop()
    return read(folder / "results.json", RankDocument)


class _Fork:
    """A rank that is a fork of this process."""

    def __init__(self, main: object, folder: Path, rank: int) -> None:
        self.returncode: int | None = None
        parent = os.getpid()
        self._pid = os.fork() or _serve(main, folder, rank, parent)

    def poll(self) -> int | None:
        """Return the status as ``subprocess`` does: None as long as the rank runs, negative if a signal ended it."""
        if self.returncode is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def stop(self) -> None:
        """End the rank."""
        if self.returncode is None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def _serve(main: object, folder: Path, rank: int, parent: int) -> NoReturn:
    end_with_parent(parent)
    output = os.open(folder / f"output.{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    assert callable(main)
    main(folder, rank)
    os._exit(1)  # not reached: a rank ends its process


def checked(given: argparse.Namespace) -> int:
    """Show what every form of a layer gives, and return the exit status."""
    from m2gen import pipeline
    from m2gen.cli.files import check_output
    from m2gen.cli.show.ranks import run_ranks
    from m2gen.cli.show.report import Display

    check_output("--out", given.out)
    request = pipeline.RanksRequest(given.ranks, (given.layer,), forms=tuple(given.form or Form))
    job = pipeline.ranks_job(pipeline.plan(given.spec, None, ()), request, (), cuda=False)
    job = replace(job, cases=tuple(case for case in job.cases if case.form is not Form.ONE), repeats=0)
    with tempfile.TemporaryDirectory(prefix="m2gen-ranks-") as name:
        return run_ranks([simulated(job, Path(name))], Display(), given.out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--spec", default="tiny.yaml")
    parser.add_argument("--layer", default="base", help="its heads are rounded up to what the ranks share")
    parser.add_argument("--form", action="append", type=Form, help="may be repeated; all if not given")
    parser.add_argument("--out", type=Path, help="a file for the results as JSON")
    given = parser.parse_args(arguments)
    if given.ranks < 2:
        parser.error(f"--ranks must be at least 2, got {given.ranks}")
    os.environ.update({**CPU, **LOOPBACK})
    sys.exit(checked(given))


if __name__ == "__main__":
    try:
        main()
    except M2genError as error:
        raise SystemExit(f"simulate_ranks: {error}") from None
