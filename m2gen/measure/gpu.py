"""The worker process on the GPU, for tuning and for benchmarks: its failures, and the calls that it keeps captured.

This module does not import torch, since a worker sets its environment first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from m2gen.db import Failure, Reason
from m2gen.measure.workers import Lost, Service, Task, without_interpreter

if TYPE_CHECKING:
    import torch

TORCH_DEVICE = "cuda"

Value = TypeVar("Value")


class Judged(Protocol):
    """A worker's result, which may be a failure."""

    @property
    def failure(self) -> Failure | None: ...


Found = TypeVar("Found", bound=Judged)


def torch_device() -> torch.device:
    """Return the device that kernels run on."""
    import torch

    return torch.device(TORCH_DEVICE)


def gpu_service(
    serve: Callable[[Task], Found], seconds: float, failed: Callable[[Failure], Found]
) -> Service[Task, Found]:
    """Return the service of a GPU worker; ``failed`` makes a result from a failure."""

    def lost(task: Task, lost: Lost) -> Found:
        return failed(Failure.of(Reason.HANG if lost.hung else Reason.CRASH, lost.reason))

    return Service(serve, without_interpreter, seconds, lost, _unusable)


def _unusable(found: Judged) -> bool:
    """Return whether the process may be unusable: the error of a kernel stays with its CUDA context."""
    return found.failure is not None and found.failure.reason is Reason.CRASH


def raised(error: Exception) -> Failure:
    """Return the failure of a candidate whose compiler, driver or kernel raised ``error``."""
    names = {kind.__name__ for kind in type(error).__mro__}
    reason = Reason.CRASH
    if "OutOfMemoryError" in names:
        reason = Reason.MEMORY
    elif names & {"OutOfResources", "CompilationError", "PTXASError"}:
        reason = Reason.LAUNCH
    return Failure.of(reason, f"{type(error).__name__}: {error}")


class Captures(Generic[Value]):
    """Captured calls that stay on the GPU for their next round: at most ``most``, and of one group at a time."""

    def __init__(self, most: int = sys.maxsize) -> None:
        self._most = most
        self._group: Hashable = None
        self._held: dict[Hashable, Value] = {}

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._held)

    def enter(self, group: Hashable) -> None:
        """Drop the captures of another group."""
        if group != self._group:
            self.clear()
            self._group = group

    def get(self, key: Hashable, capture: Callable[[], Value]) -> Value:
        """Return the capture under a key, or capture it now, dropping others if there is no room."""
        import torch

        if key not in self._held:
            while len(self._held) >= self._most:
                del self._held[next(iter(self._held))]
            try:
                self._held[key] = capture()
            except torch.OutOfMemoryError:
                if not self._held:
                    raise
        if key not in self._held:  # below the handler, whose error holds what the failed capture had allocated
            self.clear()
            self._held[key] = capture()
        return self._held[key]

    def clear(self) -> None:
        """Drop all captures, and free their memory."""
        import torch

        self._held.clear()
        torch.cuda.empty_cache()
