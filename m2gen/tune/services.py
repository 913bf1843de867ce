"""The worker processes of searches: several that compile candidates, and one on the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from m2gen.measure.context import Context
from m2gen.measure.workers import Service, Worker
from m2gen.tune.trial import Compiled, CompileTask, Measurement, Task


@dataclass(frozen=True)
class Services:
    """The services that compile and measure candidates, and the number of compiling processes."""

    compile: Service[CompileTask, Compiled]
    measure: Service[Task, Measurement]
    compilers: int
    start: Callable[[Service[Any, Any]], Worker[Any, Any]] = Worker


@dataclass(frozen=True)
class TuningContext(Context):
    """A GPU and the services for searches on it, real or simulated."""

    services: Services
    now: Callable[[], float] = time.monotonic
    """The clock by which budgets pass."""


@dataclass(frozen=True)
class Processes:
    """The processes of services, which one search after the other uses."""

    compilers: tuple[Worker[CompileTask, Compiled], ...]
    gpu: Worker[Task, Measurement]

    @property
    def busy(self) -> list[Worker[Any, Any]]:
        every: tuple[Worker[Any, Any], ...] = (*self.compilers, self.gpu)
        return [worker for worker in every if worker.task is not None]


@contextmanager
def processes_of(services: Services) -> Iterator[Processes]:
    """Yield the processes of services; they start with their first tasks and end with the context."""
    compilers = tuple(services.start(services.compile) for _ in range(services.compilers))
    processes = Processes(compilers, services.start(services.measure))
    try:
        yield processes
    finally:
        for worker in (*compilers, processes.gpu):
            worker.stop()
