"""The worker process on the GPU, which checks and times implementations; it may crash or hang."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m2gen.bench.entries import TimerResult, TimerTask
from m2gen.bench.kinds import TimerStep
from m2gen.db import Failure, Reason
from m2gen.measure.gpu import Captures, gpu_service, raised, torch_device

if TYPE_CHECKING:  # these import torch, and a worker must set its environment first
    from m2gen.measure.clock import Clock

SECONDS = 600.0
"""Longest that a step may take: compiling an unrolled reference takes minutes."""

_CLOCKS: Captures[Clock] = Captures()
"""Clocks of the current workload's entries."""


def serve(task: TimerTask) -> TimerResult:
    """Do one step; any exception is the implementation's failure."""
    from m2gen.bench.operators import CannotServe

    try:
        return _serve(task)
    except (CannotServe, ImportError) as error:
        return TimerResult(failure=Failure.of(Reason.LAUNCH, str(error)))
    except Exception as error:  # raised by a compiler, a driver, a kernel or a peer
        return TimerResult(failure=raised(error))


def _serve(task: TimerTask) -> TimerResult:
    import torch

    from m2gen.bench.check import failure_of
    from m2gen.bench.clock import captured, host_us, sampled

    entry, device = task.entry, torch_device()
    _CLOCKS.enter(entry.workload)
    wrong = None
    if task.step is TimerStep.ADMIT:
        wrong = failure_of(entry, device)
        if wrong is not None and not entry.implementation.timing_only:
            return TimerResult(failure=wrong)
        torch.cuda.empty_cache()
    clock = _CLOCKS.get(entry, lambda: captured(entry, device))
    if task.step is TimerStep.SAMPLE:
        return sampled(clock)
    return TimerResult(extra_bytes=clock.extra_bytes, host_us=host_us(entry, device), unverified=wrong)


GPU = gpu_service(serve, SECONDS, lambda failure: TimerResult(failure=failure))
