"""The worker process on the GPU, which checks and times layers; it may crash or hang."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m2gen.bench.kinds import TimerStep
from m2gen.bench.layers.entries import LayerEntry, LayerResult, LayerTask
from m2gen.db import Failure, Reason
from m2gen.measure.context import installed
from m2gen.measure.gpu import Captures, gpu_service, raised, torch_device

if TYPE_CHECKING:  # these import torch, and a worker must set its environment first
    from m2gen.bench.layers.clock import LayerClock
    from m2gen.bench.layers.subject import LayerSubject

SECONDS = 1800.0
"""Longest that a step may take: kernels that tune themselves take minutes."""

_CLOCKS: Captures[LayerClock] = Captures()
"""Clocks of the current workload's entries."""


def serve(task: LayerTask) -> LayerResult:
    """Do one step; any exception is the layer's failure."""
    from m2gen.bench.operators import CannotServe

    try:
        return _serve(task)
    except (CannotServe, ImportError) as error:
        return LayerResult(failure=Failure.of(Reason.LAUNCH, str(error)))
    except Exception as error:  # raised by a compiler, a driver, a kernel or another package
        return LayerResult(failure=raised(error))


def _serve(task: LayerTask) -> LayerResult:
    _CLOCKS.enter(task.entry.workload)
    if task.step is TimerStep.ADMIT:
        return _admitted(task.entry)
    return _CLOCKS.get(task.entry, lambda: _prepared(task.entry, _subject(task.entry))).sample()


def _admitted(entry: LayerEntry) -> LayerResult:
    """Check a layer, and keep its clock if it passes or is to be timed all the same."""
    import torch

    from m2gen.bench.layers.check import failure_of

    subject = _subject(entry)
    versions = tuple((name, installed(name)) for name in ("torch", "triton", *subject.packages))
    wrong = failure_of(subject, entry.workload.hidden, torch_device(), decodes=entry.workload.call.decodes)
    if wrong is not None and not entry.layer.timing_only:
        return LayerResult(versions=versions, failure=wrong)
    torch.cuda.empty_cache()
    clock = _CLOCKS.get(entry, lambda: _prepared(entry, subject))
    guard = "" if entry.workload.call.decodes else subject.guard
    return LayerResult(
        extra_bytes=clock.clock.extra_bytes,
        traffic=clock.traffic,
        kernels=clock.kernels,
        versions=versions,
        unverified="; ".join(filter(None, (guard, str(wrong or "")))),
        uncaptured=clock.uncaptured,
    )


def _subject(entry: LayerEntry) -> LayerSubject:
    from m2gen.bench.layers.makers import subject_of
    from m2gen.bench.operators import CannotServe

    subject = subject_of(entry, torch_device())
    if entry.workload.call.decodes and subject.decoder is None:
        raise CannotServe(f"{entry.layer.name} decodes nothing")
    return subject


def _prepared(entry: LayerEntry, subject: LayerSubject) -> LayerClock:
    from m2gen.bench.layers.clock import prepared

    return prepared(subject, entry.workload, torch_device())


GPU = gpu_service(serve, SECONDS, lambda failure: LayerResult(failure=failure))
