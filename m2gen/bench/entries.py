"""The types of benchmarks: workloads, implementations and timers. Imports neither torch nor triton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from m2gen.bench.kinds import Call, Kind, TimerStep
from m2gen.db import Failure
from m2gen.measure.context import Context
from m2gen.schedule import Schedule
from m2gen.variant import Variant

DRAFTS = 3
"""Number of drafts that speculative decoding has beside each token."""
PROMPT = 256
"""Longest prompt, in tokens: packed, they are what engines give one call, thousands of tokens for 64 requests."""


def sized(call: Call, batch: int, seq: int, packed: bool = False) -> str:
    """Return the size of a call as tables and progress show it."""
    if call.prefills:
        return f"{batch} prompts, S1 to {seq}" + (", pool" if call.pooled else "")
    if call.drafts:
        return f"B{batch} {seq} tokens {'at once' if call is Call.STEPS else 'one by one'}, pool"
    if packed:
        return f"{batch} packed, S1 to {seq}"
    if not call.decodes:
        return f"B{batch} S{seq}"
    kinds = {Call.DECODE_BF16: ", bf16 state", Call.DECODE_POOL: ", pool", Call.DECODE_ORDERED: ", pool in order"}
    return f"B{batch} token" + kinds.get(call, "")


@dataclass(frozen=True)
class BenchWorkload:
    """One call of a variant, with its sizes."""

    layer: str
    variant: Variant
    batch: int
    seq: int
    call: Call = Call.SEQUENCE
    packed: bool = False
    """Whether the batch's sequences are packed, of seeded lengths from 1 to ``seq``."""

    @property
    def name(self) -> str:
        return f"{self.layer} {self.variant.dtype} {sized(self.call, self.batch, self.seq, self.packed)}"


def serving_workloads(layer: str, variant: Variant, batch: int) -> list[BenchWorkload]:
    """Return the calls of an engine that serves ``batch`` requests: tokens, prompts, and tokens with drafts."""
    token = BenchWorkload(layer, variant, batch, 1, Call.DECODE)
    prompts = BenchWorkload(layer, variant, batch, PROMPT, Call.PREFILL, packed=True)
    drafts = BenchWorkload(layer, variant, batch, 1 + DRAFTS, Call.SINGLES)
    return [
        *(replace(token, call=call) for call in (Call.DECODE, Call.DECODE_BF16, Call.DECODE_POOL, Call.DECODE_ORDERED)),
        *(replace(prompts, call=call) for call in (Call.PREFILL, Call.PREFILL_POOL)),
        *(replace(drafts, call=call) for call in (Call.SINGLES, Call.STEPS)),
    ]


@dataclass(frozen=True)
class Implementation:
    """One implementation of the operator."""

    kind: Kind
    schedule: Schedule
    """The schedule of a generated implementation; of others the default, from which floors are computed."""
    source: str = ""
    """Tier and record of a generated schedule, or the adapter of a peer as ``module:function``."""
    package: Path | None = None
    """Folder of the package with a generated implementation."""
    label: str = ""
    """Name of the peer."""
    timing_only: bool = False
    """Whether it is timed although its results fail the check, and marked."""

    @property
    def name(self) -> str:
        return self.label or str(self.kind)


@dataclass(frozen=True)
class Entry:
    """An implementation on a workload."""

    workload: BenchWorkload
    implementation: Implementation
    arm: int = 0
    """Tells apart entries of the same binary, which is timed twice to measure noise."""

    @property
    def steps(self) -> int:
        """Number of steps in each timed call."""
        return min(self.workload.seq, self.implementation.kind.most_steps or self.workload.seq)

    @property
    def timed(self) -> BenchWorkload:
        """The workload with the number of steps that are timed."""
        return replace(self.workload, seq=self.steps)


@dataclass(frozen=True)
class TimerTask:
    """One step of a timer with one entry."""

    entry: Entry
    step: TimerStep


@dataclass(frozen=True)
class TimerResult:
    """A timer's result: times of single calls in milliseconds, or a failure."""

    forward_ms: tuple[float, ...] = ()
    """Times of the forward without gradients, or of a decoding step."""
    step_ms: tuple[float, ...] = ()
    """Times of a forward that saves for the backward plus the backward; empty for decoding."""
    extra_bytes: int = 0
    """Peak allocation of forward and backward beyond the inputs."""
    host_us: float | None = None
    """Host time of a forward without gradients; for generated operators alone."""
    failure: Failure | None = None
    unverified: Failure | None = None
    """Why the check failed of an implementation that is timed all the same."""

    def __add__(self, other: TimerResult) -> TimerResult:
        return TimerResult(
            self.forward_ms + other.forward_ms,
            self.step_ms + other.step_ms,
            max(self.extra_bytes, other.extra_bytes),
            self.host_us if other.host_us is None else other.host_us,
            self.failure or other.failure,
            self.unverified or other.unverified,
        )


class Timer(Protocol):
    """Checks implementations against the oracle and times them: a GPU worker, or in tests a script."""

    def ask(self, task: TimerTask) -> TimerResult: ...


@dataclass(frozen=True)
class BenchContext(Context):
    """A GPU and its timer, real or scripted."""

    timer: Timer
