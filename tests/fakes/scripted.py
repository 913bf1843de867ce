"""A timer that does what a script says: times, noise and failures of implementations, with no GPU and no torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from records import H200, environment

from m2gen.bench.entries import Entry, TimerResult, TimerTask
from m2gen.bench.kinds import Call, Kind, TimerStep
from m2gen.db import Failure, Reason
from m2gen.device import TARGETS
from m2gen.pipeline import BenchContext

DEVICE = replace(TARGETS["sm_90"], name=H200)
SAMPLES = 5
FASTER = {"default": 1.0, "tuned": 0.5, "eager": 40.0, "compiled": 10.0}
"""Time per step, as fractions of the default's."""


def by_steps(entry: Entry) -> float:
    """Return milliseconds of a forward: a hundredth for each step of each sequence."""
    return 0.01 * entry.steps * entry.workload.batch * FASTER.get(entry.implementation.name, 2.0)


@dataclass
class Script:
    """A timer whose forwards take ``ms``, and whose steps take three times as long."""

    ms: Callable[[Entry], float] = by_steps
    noise: float = 0.001
    """Fraction by which samples differ from each other."""
    drift: float = 0.0
    """Fraction by which the second arm of an entry is slower than the first."""
    broken: Mapping[str, Failure] = field(default_factory=dict)
    """Failures of implementations at the check."""
    breaks: Mapping[str, Failure] = field(default_factory=dict)
    """Failures of implementations that passed it, when they are timed."""
    asked: list[TimerTask] = field(default_factory=list)
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    def ask(self, task: TimerTask) -> TimerResult:
        """Do one step as the script says."""
        self.asked.append(task)
        name = task.entry.implementation.name
        if task.step is TimerStep.ADMIT:
            host = 20.0 if task.entry.implementation.kind.generated else None
            found = self.broken.get(name)
            failure, unverified = (None, found) if task.entry.implementation.timing_only else (found, None)
            return TimerResult(extra_bytes=10**9, host_us=host, failure=failure, unverified=unverified)
        if name in self.breaks:
            return TimerResult(failure=self.breaks[name])
        middle = self.ms(task.entry) * (1 + self.drift * task.entry.arm)
        forward = tuple(middle * (1 + self.noise * self.draw.uniform(-1, 1)) for _ in range(SAMPLES))
        sequence = task.entry.workload.call is Call.SEQUENCE
        return TimerResult(forward, tuple(3 * ms for ms in forward) if sequence else ())

    def sampled(self) -> list[str]:
        """Return the implementations that were timed, in their order."""
        return [task.entry.implementation.name for task in self.asked if task.step is TimerStep.SAMPLE]


def context(script: Script) -> BenchContext:
    """Return a context of an H200 whose timer is a script."""
    return BenchContext(DEVICE, environment(), "gpu-scripted", "scripted:0", script)


def given(script: Script) -> Callable[[str], object]:
    """Return a function that gives the command line a scripted context in place of the GPU at hand."""

    @contextmanager
    def this_bench_context(command: str) -> Iterator[BenchContext]:
        yield context(script)

    return this_bench_context


WRONG = Failure(Reason.WRONG, "dq of plain must be within 1.00e-03, got 2.00e-01")
__all__ = ["DEVICE", "WRONG", "Kind", "Script", "context", "given"]
