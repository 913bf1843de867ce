"""Run tasks in separate processes: a crash or hang costs one task, never the run.

Each process leads a process group, so that its children, such as an assembler, end with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, resource_tracker
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
GRACE_SECONDS = 10.0
"""Longest that a process may take to end by itself."""


def cpus() -> int:
    """Return the number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def without_interpreter() -> None:
    """Prepare a process for compiled kernels: switch Triton's interpreter off."""
    os.environ.pop("TRITON_INTERPRET", None)


@dataclass(frozen=True)
class Lost:
    """How the process that had a task ended."""

    reason: str
    hung: bool = False

    def at(self, work: str) -> str:
        """Return the reason with the work that the process was doing, such as "compiling"."""
        return f"{work} {self.reason}" if self.hung else f"{self.reason} while {work}"


@dataclass(frozen=True)
class Service(Generic[Task, Result]):
    """How tasks are done, and how their failures become results."""

    serve: Callable[[Task], Result]
    """Does one task in the worker process; must be importable."""
    prepare: Callable[[], None]
    """Runs first in every worker process, before ``serve`` or a task imports anything."""
    seconds: float
    """Longest that a task may take, including the start of its process."""
    lost: Callable[[Task, Lost], Result]
    """Returns the result of a task whose process died or was stopped."""
    suspect: Callable[[Result], bool] = lambda result: False
    """Returns whether the process that gave this result, such as a GPU error, must not serve again."""
    now: Callable[[], float] = time.monotonic
    """The clock by which ``seconds`` pass."""


def run_isolated(
    groups: Iterable[Iterable[Task]], service: Service[Task, Result], processes: int
) -> Iterator[tuple[Task, Result]]:
    """Yield each task with its result as it is known; the tasks of a group run in one process, in order."""
    waiting = deque(deque(group) for group in groups)
    at: dict[Worker[Task, Result], deque[Task]] = {}

    def begin(worker: Worker[Task, Result]) -> None:
        """Begin the next task of the group, or of the next group; end the process if there is none."""
        while not at[worker] and waiting:
            at[worker] = waiting.popleft()
        if at[worker]:
            worker.begin(at[worker].popleft())
        else:
            worker.stop()

    try:
        for worker in [Worker(service) for _ in range(min(processes, len(waiting)))]:
            at[worker] = deque()
            begin(worker)
        while busy := [worker for worker in at if worker.task is not None]:
            for worker in finished(busy):
                yield worker.collect()
                begin(worker)
    finally:
        for worker in at:
            worker.stop()


def finished(busy: Sequence[Worker[Any, Any]], seconds: float = float("inf")) -> list[Worker[Any, Any]]:
    """Wait up to ``seconds``, and return the workers that have a result or are out of time."""
    least = min(seconds, *(worker.left for worker in busy))
    ready = connection.wait([worker.pipe for worker in busy], timeout=max(0.0, least))
    return [worker for worker in busy if worker.pipe in ready or worker.left < 0]


def _process(pipe: Any, parent: int, prepare: Callable[[], None], serve: Callable[[Any], Any]) -> None:
    """Be a worker process; the parent handles Ctrl-C."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(parent)
    prepare()
    _loop(pipe, serve)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Triton 3.9 lists what its bindings leak when it is unloaded


def _loop(pipe: Any, serve: Callable[[Any], Any]) -> None:
    """Serve the tasks from a pipe until it is closed."""
    while True:
        try:
            task = pipe.recv()
        except (EOFError, ConnectionError):  # closed, perhaps with an unread result
            return
        result = serve(task)
        try:
            pipe.send(result)
        except ConnectionError:
            return


def end_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, even by SIGKILL in the middle of a task.

    A parent that died before that, of which Linux says nothing any more, ends this process at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of prctl(2)
        if os.getppid() != parent:
            os._exit(1)


class Worker(Generic[Task, Result]):
    """A worker process and its current task; a process that cannot be trusted is replaced by a new one."""

    def __init__(self, service: Service[Task, Result]) -> None:
        self._service = service
        self._process: Any = None
        self.pipe: Any = None
        self.task: Task | None = None
        self._deadline = 0.0

    def begin(self, task: Task) -> None:
        """Send a task to the process, which is started if there is none."""
        if self._process is None:
            self._start()
        self.task = task
        self._deadline = self._service.now() + self._service.seconds
        with contextlib.suppress(OSError):  # ``collect`` finds out that the process is gone
            self.pipe.send(task)

    @property
    def left(self) -> float:
        """Seconds that the task may still take."""
        return self._deadline - self._service.now()

    def collect(self) -> tuple[Task, Result]:
        """Return the task and its result, received or lost; end a process that cannot be trusted."""
        task = self.task
        assert task is not None
        if not self.pipe.poll():
            self.stop()
            return task, self._service.lost(task, Lost(f"took longer than {self._service.seconds:g} s", hung=True))
        try:
            result: Result = self.pipe.recv()
        except (EOFError, OSError):
            return task, self._service.lost(task, Lost(f"its process ended with {self._reap()}"))
        self.task = None
        if self._service.suspect(result):
            self.stop()
        return task, result

    def ask(self, task: Task) -> Result:
        """Do one task, and wait for its result."""
        self.begin(task)
        while not finished([self]):
            pass
        return self.collect()[1]

    def _start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, os.getpid(), self._service.prepare, self._service.serve)
        self._process = context.Process(target=_process, args=arguments, daemon=True)
        resource_tracker.ensure_running()  # which unblocks signals when it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited, until ``_process`` ignores it
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def _reap(self) -> str:
        """Return the signal or exit status of a process that died, and end its children."""
        self._process.join(GRACE_SECONDS)
        code = self._process.exitcode
        self._kill()
        self.stop()
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"

    def drop(self) -> None:
        """End the process if it is in the middle of a task."""
        if self.task is not None:
            self.stop()

    def stop(self) -> None:
        """End the process, which may be in the middle of a task."""
        busy, self.task = self.task is not None, None
        if self._process is None:
            return
        self.pipe.close()
        if busy:
            self._kill()
        self._process.join(GRACE_SECONDS)
        if self._process.is_alive():
            self._kill()
            self._process.join()
        self._process = None

    def _kill(self) -> None:
        """Kill the process, and the group that it leads once it has started."""
        self._process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
