"""What is timed beside what, and who times it. Imports neither torch nor triton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from m2gen.bench.kinds import Call, Kind, TimerStep
from m2gen.db import Failure
from m2gen.measure.context import Context
from m2gen.schedule import Schedule
from m2gen.variant import Variant


def sized(call: Call, batch: int, seq: int) -> str:
    """Return the size of a call as tables and progress show it."""
    if not call.decodes:
        return f"B{batch} S{seq}"
    return f"B{batch} token" + (", bf16 state" if call.narrow_state else "")


@dataclass(frozen=True)
class BenchWorkload:
    """A call of one variant, of one size."""

    layer: str
    variant: Variant
    batch: int
    seq: int
    call: Call = Call.SEQUENCE

    @property
    def name(self) -> str:
        return f"{self.layer} {self.variant.dtype} {sized(self.call, self.batch, self.seq)}"


@dataclass(frozen=True)
class Implementation:
    """One implementation that is timed."""

    kind: Kind
    schedule: Schedule
    """Its own where it is generated, else the default, by which floors are counted."""
    source: str = ""
    """Tier and record of a generated one's schedule; the adapter of a peer, as ``module:function``."""
    package: Path | None = None
    """Folder of the package that a generated one is in."""
    label: str = ""
    """Name of a peer."""

    @property
    def name(self) -> str:
        return self.label or str(self.kind)


@dataclass(frozen=True)
class Entry:
    """An implementation on a workload."""

    workload: BenchWorkload
    implementation: Implementation
    arm: int = 0
    """Tells entries apart that are the same binary, timed beside itself to see what noise is."""

    @property
    def steps(self) -> int:
        """Steps of each timed call."""
        return min(self.workload.seq, self.implementation.kind.most_steps or self.workload.seq)

    @property
    def timed(self) -> BenchWorkload:
        """The workload as far as it is timed."""
        return replace(self.workload, seq=self.steps)


@dataclass(frozen=True)
class TimerTask:
    """One step with one entry."""

    entry: Entry
    step: TimerStep


@dataclass(frozen=True)
class TimerResult:
    """What a timer found: times of single calls in milliseconds, or why there are none."""

    forward_ms: tuple[float, ...] = ()
    """Without gradients: nothing is saved. Of decoding: the step."""
    step_ms: tuple[float, ...] = ()
    """Forward that saves what the backward needs, and the backward; none of decoding."""
    extra_bytes: int = 0
    """Peak allocation of a forward and backward beyond the inputs."""
    host_us: float | None = None
    """What a forward without gradients takes of the host; of generated operators alone."""
    failure: Failure | None = None

    def __add__(self, other: TimerResult) -> TimerResult:
        return TimerResult(
            self.forward_ms + other.forward_ms,
            self.step_ms + other.step_ms,
            max(self.extra_bytes, other.extra_bytes),
            self.host_us if other.host_us is None else other.host_us,
            self.failure or other.failure,
        )


class Timer(Protocol):
    """Whoever holds implementations against the oracle and times them: a GPU, or in tests a script."""

    def ask(self, task: TimerTask) -> TimerResult: ...


@dataclass(frozen=True)
class BenchContext(Context):
    """A GPU and the timer that has it, real or scripted."""

    timer: Timer
