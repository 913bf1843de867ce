"""One workload: every contender is held against the oracle, and those that pass are timed in turns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from m2gen.bench.contest import Contender, Entry, Found, Task, Timer, Workload
from m2gen.bench.words import Step
from m2gen.db import Estimate, Failure
from m2gen.device import Device
from m2gen.measure.roofline import decoding_work, floors_ms, peaks_of, work_of
from m2gen.measure.rounds import in_rounds
from m2gen.measure.statistics import estimate

ROUNDS = 6
"""In which every contender is timed."""


@dataclass(frozen=True)
class Timing:
    """A median with its interval, and how long each limit of the GPU alone makes the call take."""

    estimate: Estimate
    floors_ms: dict[str, float]

    @property
    def parts(self) -> dict[str, float]:
        """Return the achieved part of each floor: 1 is as fast as the limit allows."""
        return {name: ms / self.estimate.median_ms for name, ms in self.floors_ms.items()}


@dataclass(frozen=True)
class Result:
    """What became of one contender on one workload."""

    entry: Entry
    found: Found
    forward: Timing | None = None
    step: Timing | None = None
    """Forward and backward."""

    @property
    def failure(self) -> Failure | None:
        return self.found.failure


def contest(
    workload: Workload, contenders: Iterable[Contender], timer: Timer, device: Device, *, seed: int = 0, arms: int = 1
) -> list[Result]:
    """Return the result of every contender, in their order; with two ``arms``, of each of them twice.

    One that fails the check, or breaks off later, is never timed again, and its result has no times.
    """
    entries = [Entry(workload, contender, arm) for contender in contenders for arm in range(arms)]
    found = {entry: timer.ask(Task(entry, Step.ADMIT)) for entry in entries}

    def sample(entry: Entry) -> Found | None:
        now = timer.ask(Task(entry, Step.SAMPLE))
        if now.failure is None:
            return now
        found[entry] += now
        return None

    admitted = [entry for entry in entries if found[entry].failure is None]
    for entry, samples in in_rounds(admitted, sample, range(ROUNDS), seed).items():
        found[entry] += samples
    return [_result(entry, found[entry], device, seed) for entry in entries]


def _result(entry: Entry, found: Found, device: Device, seed: int) -> Result:
    if found.failure is not None:
        return Result(entry, found)

    def timing(samples: tuple[float, ...], *, training: bool) -> Timing | None:
        return Timing(estimate(samples, seed), floors(entry, device, training=training)) if samples else None

    return Result(entry, found, timing(found.forward_ms, training=False), timing(found.step_ms, training=True))


def floors(entry: Entry, device: Device, *, training: bool) -> dict[str, float]:
    """Return the floors of a call of ``entry`` in milliseconds; none on a GPU whose peaks are not known."""
    peaks = peaks_of(device.name)
    if peaks is None:
        return {}
    workload = entry.timed
    if workload.call.decodes:
        work = decoding_work(workload.variant, workload.batch, 2 if workload.call.narrow_state else 4)
    else:
        sizes = (workload.batch, workload.seq)
        work = work_of(workload.variant, entry.contender.schedule, sizes, training=training)
    return floors_ms(work, peaks, device.sm_count, workload.variant)
