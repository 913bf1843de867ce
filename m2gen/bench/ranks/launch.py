"""Start the ranks of a job, and end them together: when all are done, when one fails, or when none makes progress."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from m2gen.bench.ranks.entries import QUIET_SECONDS, RankFailure, read, write
from m2gen.bench.ranks.pulse import state_of
from m2gen.errors import RanksError

POLL_SECONDS = 0.1
LOOKS = 10
"""How often it is looked, once a rank has failed, whether another was killed before that."""
ABORTED = -signal.SIGABRT
"""Status of a process that gave up, as libraries have one do once another rank is gone."""
INNERMOST = re.compile(r"^Current thread .*\n +File (.+)$", re.MULTILINE)
"""Where the thread was that a signal hit, as ``faulthandler`` prints it."""
CPU = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
"""Environment of ranks that are CPUs."""
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}
"""Environment of ranks of one host."""


class Process(Protocol):
    """A rank's process, of which ``returncode`` is what ``poll`` returned last."""

    returncode: int | None

    def poll(self) -> int | None: ...


def write_error(folder: Path, rank: int, error: str) -> None:
    """Say in one line what a rank failed with."""
    write(_error_file(folder, rank), RankFailure(time.monotonic_ns(), error))


def _error_file(folder: Path, rank: int) -> Path:
    return folder / f"error{rank}.json"


def run_ranks(
    commands: Sequence[Sequence[str]],
    folder: Path,
    environment: Mapping[str, str],
    quiet_seconds: float = QUIET_SECONDS,
) -> Iterator[None]:
    """Run one command for each rank, and yield now and then until all of them are done.

    Raises RanksError, once none of them runs any more, with what the first rank failed with; or after
    ``quiet_seconds`` in which nothing in ``folder`` changed.
    """
    with _started(commands, folder, environment) as processes:
        changed, seen = time.monotonic(), _state(folder)
        while True:
            states = [process.poll() for process in processes]
            if any(states):
                raise RanksError(failure(processes, folder))
            if all(state == 0 for state in states):
                return
            if (now := _state(folder)) != seen:
                changed, seen = time.monotonic(), now
            if time.monotonic() - changed > quiet_seconds:
                waiting = [rank for rank, state in enumerate(states) if state is None]
                none = f"got none of rank {', '.join(map(str, waiting))}"
                doing = _doing(folder, waiting)
                raise RanksError(f"ranks must make progress within {quiet_seconds:g} s, {none}{doing}")
            yield
            time.sleep(POLL_SECONDS)


@contextmanager
def _started(
    commands: Sequence[Sequence[str]], folder: Path, environment: Mapping[str, str]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start processes, each the leader of a group, so that its children, such as a compiler, end with it."""
    with ExitStack() as stack:
        processes = []
        for rank, command in enumerate(commands):
            output = stack.enter_context(open(folder / f"output.{rank}", "wb"))
            everything = {**os.environ, **environment}
            process = subprocess.Popen(
                command, env=everything, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            processes.append(process)
            stack.callback(_end, process)
        yield processes


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _doing(folder: Path, ranks: Sequence[int]) -> str:
    """Return what ranks do, those that do the same together: what one alone does, the others may wait for."""
    states = {rank: state for rank in ranks if (state := state_of(folder, rank))}
    alike = {state: [str(rank) for rank, other in states.items() if other == state] for state in states.values()}
    return "".join(f"; rank {', '.join(of)}: {state}" for state, of in alike.items())


def _state(folder: Path) -> tuple[float, ...]:
    """Return when each file of results was last written."""
    found = []
    for path in sorted(folder.glob("result*")):
        with contextlib.suppress(FileNotFoundError):
            found.append(path.stat().st_mtime)
    return tuple(found)


def failure(processes: Sequence[Process], folder: Path) -> str:
    """Return what the first rank failed with: the others fail since it is gone.

    A process closes its connections before it can be waited for, so that others may have said that it is gone, and
    ended, while it still seems to run: a rank that spoke or aborts is not blamed before there was time to find it.
    """
    died, said = _ended(processes, folder)
    for _ in range(LOOKS):
        statuses = [process.returncode for process in processes]
        if any(statuses[rank] != ABORTED for rank in died) or None not in statuses:
            break
        time.sleep(POLL_SECONDS)
        late, said = _ended(processes, folder)
        died = [rank for rank in late if processes[rank].returncode != ABORTED] or died
    if not died:
        rank = min(said, key=lambda rank: said[rank].at)
        return f"rank {rank} of {len(processes)} failed: {said[rank].error}"
    rank = min(died, key=lambda rank: _doubt(processes[rank].returncode or 0))
    status = processes[rank].returncode or 0
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"rank {rank} of {len(processes)} ended with {how}: {_last_words(folder / f'output.{rank}')}"


def _doubt(status: int) -> int:
    """Return how likely it is that another rank's end made one end so: who is killed is not, who aborts may be."""
    return 2 if status == ABORTED else int(status > 0)


def _ended(processes: Sequence[Process], folder: Path) -> tuple[list[int], dict[int, RankFailure]]:
    """Return the ranks that ended without a word, and when and what others said."""
    states = [process.poll() for process in processes]  # before files are listed: who has ended has said what it will
    said = {
        rank: read(path, RankFailure) for rank in range(len(states)) if (path := _error_file(folder, rank)).is_file()
    }
    return [rank for rank, state in enumerate(states) if state and rank not in said], said


def _last_words(path: Path) -> str:
    """Return the last line that a rank printed, and what it was doing where ``faulthandler`` says that."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    printed, _, trace = text.partition("Fatal Python error: ")
    said = next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "")
    found = INNERMOST.search(trace)
    return "; ".join(filter(None, (said, found and f"it was in {found[1]}"))) or "it printed nothing"


def worker_command(folder: Path, rank: int) -> list[str]:
    """Return the command of a rank of the job in ``folder``, which ends with this process."""
    return [sys.executable, "-m", "m2gen.bench.ranks", str(folder), str(rank), str(os.getpid())]
