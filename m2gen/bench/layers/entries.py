"""The types of benchmarks of layers: workloads, layers and timers. Imports neither torch nor triton."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from m2gen.bench.entries import sized
from m2gen.bench.kinds import Call, TimerStep
from m2gen.bench.layers.breakdown import KernelTime
from m2gen.bench.layers.kinds import LayerKind
from m2gen.db import Failure
from m2gen.measure.context import Context
from m2gen.variant import Variant


@dataclass(frozen=True)
class LayerWorkload:
    """One call of layers in a model of some width."""

    layer: str
    variant: Variant
    hidden: int
    """Width of the model."""
    batch: int
    seq: int
    """Tokens of a sequence, or for decoding those that are there before the one that is timed."""
    call: Call = Call.SEQUENCE

    @property
    def name(self) -> str:
        return f"{self.layer} {self.variant.dtype} {self.size}"

    @property
    def size(self) -> str:
        """The size as tables and progress show it."""
        after = f" after {self.seq}" if self.call.decodes else ""
        return f"hidden {self.hidden}, {sized(self.call, self.batch, self.seq)}{after}"


@dataclass(frozen=True)
class LayerUnderTest:
    """One layer of those that are timed side by side."""

    kind: LayerKind
    source: str = ""
    """The adapter as ``module:function``; of m2gen's, tier and record of the schedule."""
    package: Path | None = None
    """Folder of the generated package, for every kind that has parts of it."""
    label: str = ""
    """Name of the peer."""
    timing_only: bool = False
    """Whether a peer is timed although its results fail the check or it refuses to run here, and marked."""

    @property
    def name(self) -> str:
        if self.kind.generated:
            return f"m2gen {self.kind}"
        return self.label or str(self.kind)


@dataclass(frozen=True)
class LayerEntry:
    """A layer on a workload."""

    workload: LayerWorkload
    layer: LayerUnderTest


@dataclass(frozen=True)
class LayerTask:
    """One step of a timer with one entry."""

    entry: LayerEntry
    step: TimerStep


@dataclass(frozen=True)
class LayerResult:
    """A timer's result: times of single calls in milliseconds, or a failure."""

    forward_ms: tuple[float, ...] = ()
    """Times of the forward without gradients, or of a token."""
    step_ms: tuple[float, ...] = ()
    """Times of forward and backward; empty for decoding."""
    captured_ms: tuple[float, ...] = ()
    """Times of the same as a CUDA graph; empty for decoding, and where it cannot be captured."""
    extra_bytes: int = 0
    """Peak allocation of the longest call, beyond what is resident before."""
    traffic: int = 0
    """Bytes of the weights and states that a token must read, and of the states that it must write."""
    kernels: tuple[KernelTime, ...] = ()
    """The kernels of a step, or of a token."""
    versions: tuple[tuple[str, str], ...] = ()
    """The packages that the layer runs on, with their versions."""
    failure: Failure | None = None
    unverified: str = ""
    """Why the layer's times are times only."""
    uncaptured: str = ""
    """Why there is no time of a CUDA graph."""

    def __add__(self, other: LayerResult) -> LayerResult:
        return LayerResult(
            self.forward_ms + other.forward_ms,
            self.step_ms + other.step_ms,
            self.captured_ms + other.captured_ms,
            max(self.extra_bytes, other.extra_bytes),
            max(self.traffic, other.traffic),
            self.kernels or other.kernels,
            self.versions or other.versions,
            self.failure or other.failure,
            self.unverified or other.unverified,
            self.uncaptured or other.uncaptured,
        )


class LayerTimer(Protocol):
    """Checks layers against float64 and times them: a GPU worker, or in tests a script."""

    def ask(self, task: LayerTask) -> LayerResult: ...


@dataclass(frozen=True)
class LayerContext(Context):
    """A GPU and its timer, real or scripted."""

    timer: LayerTimer
