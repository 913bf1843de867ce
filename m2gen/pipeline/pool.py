"""Run tasks in processes of their own: one that crashes or hangs costs its task, never the run."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, get_context
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
GRACE_SECONDS = 10.0
"""How long a process may take to end by itself."""


@dataclass(frozen=True)
class Service(Generic[Task, Result]):
    """How tasks are done, and what becomes of those that are not."""

    serve: Callable[[Task], Result]
    """Does one task in a process; a function that can be imported."""
    prepare: Callable[[], None]
    """Runs first in every process, before anything that ``serve`` or a task needs is imported."""
    seconds: float
    """Longest that a task may take, with the start of its process."""
    lost: Callable[[Task, str], Result]
    """Returns the result of a task whose process died or was stopped, and why."""
    suspect: Callable[[Result], bool] = lambda result: False
    """Whether a process that gave this result, of a GPU's error say, must not serve again."""


def run_isolated(
    groups: Iterable[Iterable[Task]], service: Service[Task, Result], processes: int
) -> Iterator[tuple[Task, Result]]:
    """Yield each task with its result as it is known; the tasks of a group go to one process, one after the other."""
    waiting = deque(deque(group) for group in groups)
    workers = [_Worker(service) for _ in range(min(processes, len(waiting)))]
    try:
        for worker in workers:
            worker.take(waiting)
        while busy := [worker for worker in workers if worker.task is not None]:
            left = min(worker.deadline for worker in busy) - time.monotonic()
            ready = connection.wait([worker.pipe for worker in busy], timeout=max(0.0, left))
            for worker in busy:
                if worker.pipe in ready or time.monotonic() > worker.deadline:
                    yield worker.collect(received=worker.pipe in ready)
                    worker.take(waiting)
    finally:
        for worker in workers:
            worker.stop()


def _loop(pipe: Any, prepare: Callable[[], None], serve: Callable[[Any], Any]) -> None:
    """Serve the tasks that come through a pipe until it is closed; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare()
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(serve(pipe.recv()))


class _Worker(Generic[Task, Result]):
    """One process at a time, and the tasks of the group that it is at."""

    def __init__(self, service: Service[Task, Result]) -> None:
        self._service = service
        self._group: deque[Task] = deque()
        self._process: Any = None
        self.pipe: Any = None
        self.task: Task | None = None
        self.deadline = 0.0

    def take(self, waiting: deque[deque[Task]]) -> None:
        """Begin the next task of the group, or of the next group; end the process where there is none."""
        self.task = None
        while not self._group and waiting:
            self._group = waiting.popleft()
        if not self._group:
            self.stop()
            return
        if self._process is None:
            self._start()
        self.task = self._group.popleft()
        self.deadline = time.monotonic() + self._service.seconds
        with contextlib.suppress(OSError):  # of a process that is gone, which ``collect`` finds out
            self.pipe.send(self.task)

    def collect(self, *, received: bool) -> tuple[Task, Result]:
        """Return the task and its result, received or lost; end a process that cannot be trusted with another."""
        task = self.task
        assert task is not None
        if not received:
            self.stop()
            return task, self._service.lost(task, f"took longer than {self._service.seconds:g} s")
        try:
            result: Result = self.pipe.recv()
        except (EOFError, OSError):
            return task, self._service.lost(task, f"its process ended with {self._reap()}")
        if self._service.suspect(result):
            self.task = None  # it is idle, and may end by itself
            self.stop()
        return task, result

    def _start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, self._service.prepare, self._service.serve)
        self._process = context.Process(target=_loop, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def _reap(self) -> str:
        """Return what a process ended with."""
        self._process.join(GRACE_SECONDS)
        code = self._process.exitcode
        self.stop()
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"

    def stop(self) -> None:
        """End the process, which may be in the middle of a task."""
        if self._process is None:
            return
        self.pipe.close()
        if self.task is not None:
            self._process.kill()
        self._process.join(GRACE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None
