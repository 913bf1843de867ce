"""The process that has the GPU: holds contenders against the oracle and times them; one may crash or hang."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from m2gen.bench.contest import Entry, Found, Task, Workload
from m2gen.bench.words import Step
from m2gen.db import Failure, Reason
from m2gen.measure.workers import Lane, Lost, Service, finished
from m2gen.tune.gpu import reason_of

if TYPE_CHECKING:  # these import torch, and a worker must set its environment first
    from m2gen.bench.clock import Clock

SECONDS = 600.0
"""Longest that a step may take: compiling an unrolled reference takes minutes."""
TORCH_DEVICE = "cuda"

_CLOCKS: dict[Entry, Clock] = {}
"""Captured entries of one workload."""


def start() -> None:
    """Set up the GPU worker: compiled kernels, never the interpreter's."""
    os.environ.pop("TRITON_INTERPRET", None)


def serve(task: Task) -> Found:
    """Do one step; whatever is raised is the contender's failure."""
    from m2gen.bench.operators import CannotServe

    try:
        return _serve(task)
    except (CannotServe, ImportError) as error:
        return Found(failure=Failure.of(Reason.LAUNCH, str(error)))
    except Exception as error:  # of a compiler, a driver, a kernel or a peer
        return Found(failure=Failure.of(reason_of(error), f"{type(error).__name__}: {error}"))


def _serve(task: Task) -> Found:
    import torch

    from m2gen.bench.gate import failure_of

    entry, device = task.entry, torch.device(TORCH_DEVICE)
    _make_room(entry.workload)
    if task.step is Step.ADMIT:
        failure = failure_of(entry, device)
        if failure is not None:
            return Found(failure=failure)
        torch.cuda.empty_cache()
        clock = _clock(entry)
        return Found(extra_bytes=clock.extra_bytes, host_us=clock.host_us)
    return _clock(entry).sample()


def _make_room(workload: Workload) -> None:
    """Drop what was captured for other workloads."""
    import torch

    if any(entry.workload != workload for entry in _CLOCKS):
        _CLOCKS.clear()
        torch.cuda.empty_cache()


def _clock(entry: Entry) -> Clock:
    """Return the captured entry, kept from its last turn or captured now."""
    import torch

    from m2gen.bench.clock import Clock

    if entry not in _CLOCKS:
        _CLOCKS[entry] = Clock(entry, torch.device(TORCH_DEVICE))
    return _CLOCKS[entry]


def _lost(task: Task, lost: Lost) -> Found:
    return Found(failure=Failure.of(Reason.HANG if lost.hung else Reason.CRASH, lost.reason))


def _suspect(found: Found) -> bool:
    """Whether the process may be unusable: an error of a kernel stays with its context."""
    return found.failure is not None and found.failure.reason is Reason.CRASH


GPU: Service[Task, Found] = Service(serve, start, SECONDS, _lost, _suspect)


class IsolatedTimer:
    """A timer in a process of its own, which is replaced where a contender takes it down."""

    def __init__(self, service: Service[Task, Found] = GPU) -> None:
        self._lane = Lane(service)

    def ask(self, task: Task) -> Found:
        """Do one step."""
        self._lane.begin(task)
        while not finished([self._lane]):
            pass
        return self._lane.collect()[1]

    def close(self) -> None:
        """End the process."""
        self._lane.stop()
