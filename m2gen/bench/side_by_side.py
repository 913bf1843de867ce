"""Check every implementation on one workload, and time those that pass in rounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field
from pydantic_core import PydanticCustomError

from m2gen.bench.entries import BenchContext, BenchWorkload, Entry, Implementation, TimerResult, TimerTask
from m2gen.bench.kinds import TimerStep
from m2gen.db import Estimate, Failure
from m2gen.device import Device
from m2gen.measure.roofline import decoding_work, floors_ms, peaks_of, with_states, work_of
from m2gen.measure.rounds import in_rounds
from m2gen.measure.statistics import estimate

ROUNDS = 6
"""Number of rounds, in each of which every implementation is timed."""

_Ms = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Times:
    """A median in milliseconds with the ends of its 95 % interval, and the GPU's floors for the call."""

    median_ms: _Ms
    low_ms: _Ms
    high_ms: _Ms
    floors_ms: dict[str, float]
    """Milliseconds that each limit of the GPU alone makes the call take."""

    def __post_init__(self) -> None:
        if not self.low_ms <= self.median_ms <= self.high_ms:  # a damaged document, which nobody could draw or compare
            raise PydanticCustomError("interval", "must have low_ms <= median_ms <= high_ms")

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.median_ms, self.low_ms, self.high_ms)

    @property
    def parts(self) -> dict[str, float]:
        """The achieved fraction of each limit: 1 is as fast as it allows."""
        return {name: ms / self.median_ms for name, ms in self.floors_ms.items()}


@dataclass(frozen=True)
class Result:
    """The result of one implementation on one workload."""

    entry: Entry
    found: TimerResult
    forward: Times | None = None
    step: Times | None = None
    """Times of forward and backward together."""

    @property
    def failure(self) -> Failure | None:
        return self.found.failure


def side_by_side(
    workload: BenchWorkload,
    implementations: Iterable[Implementation],
    context: BenchContext,
    *,
    seed: int = 0,
    arms: int = 1,
) -> list[Result]:
    """Return the results of the implementations in their order; with two ``arms``, each is timed as two entries.

    An entry that fails the check, or later, is not timed again, and its result has no times.
    """
    entries = [Entry(workload, implementation, arm) for implementation in implementations for arm in range(arms)]
    found = {entry: context.timer.ask(TimerTask(entry, TimerStep.ADMIT)) for entry in entries}

    def sample(entry: Entry) -> TimerResult | None:
        now = context.timer.ask(TimerTask(entry, TimerStep.SAMPLE))
        if now.failure is None:
            return now
        found[entry] += now
        return None

    admitted = [entry for entry in entries if found[entry].failure is None]
    for entry, samples in in_rounds(admitted, sample, range(ROUNDS), seed).items():
        found[entry] += samples
    return [_result(entry, found[entry], context.device, seed) for entry in entries]


def _result(entry: Entry, found: TimerResult, device: Device, seed: int) -> Result:
    if found.failure is not None:
        return Result(entry, found)

    def times(samples: tuple[float, ...], *, training: bool) -> Times | None:
        if not samples:
            return None
        return Times(**asdict(estimate(samples, seed)), floors_ms=floors(entry, device, training=training))

    return Result(entry, found, times(found.forward_ms, training=False), times(found.step_ms, training=True))


def floors(entry: Entry, device: Device, *, training: bool) -> dict[str, float]:
    """Return the floors of a call of ``entry`` in milliseconds; empty for a GPU whose peak rates are not known."""
    peaks = peaks_of(device.name)
    if peaks is None:
        return {}
    workload = entry.timed
    if workload.call.decodes:
        width = 2 if workload.call.narrow_state else 4
        work = decoding_work(workload.variant, workload.batch, width, workload.seq)
    else:
        sizes = (1, _tokens(workload)) if workload.packed else (workload.batch, workload.seq)
        work = work_of(workload.variant, entry.implementation.schedule, sizes, training=training)
        if workload.call.prefills:
            work = with_states(work, workload.variant, workload.batch)
    return floors_ms(work, peaks, device.sm_count, workload.variant)


def _tokens(workload: BenchWorkload) -> int:
    from m2gen.problem import packed_problem

    return sum(packed_problem(workload.batch, workload.seq).lengths or ())
