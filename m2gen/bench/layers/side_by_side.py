"""Check every layer on one workload, and time those that pass in rounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from m2gen.bench.kinds import TimerStep
from m2gen.bench.layers.entries import (
    LayerContext,
    LayerEntry,
    LayerResult,
    LayerTask,
    LayerUnderTest,
    LayerWorkload,
)
from m2gen.bench.side_by_side import ROUNDS
from m2gen.db import Estimate
from m2gen.measure.roofline import peaks_of
from m2gen.measure.rounds import in_rounds
from m2gen.measure.statistics import estimate


@dataclass(frozen=True)
class LayerTimes:
    """The result of one layer on one workload; there are no times of one that failed."""

    entry: LayerEntry
    found: LayerResult
    forward: Estimate | None = None
    """Time of a forward without gradients, or of a token."""
    step: Estimate | None = None
    """Time of forward and backward together."""
    captured: Estimate | None = None
    """Time of the same as a CUDA graph, for which the GPU waits for no host."""
    floor_ms: float | None = None
    """Milliseconds in which the GPU reads a token's weights and states and writes the states; None of sequences."""


def layers_side_by_side(
    workload: LayerWorkload, layers: Iterable[LayerUnderTest], context: LayerContext, seed: int = 0
) -> list[LayerTimes]:
    """Return the results of the layers in their order; one that fails the check, or later, is not timed again."""
    entries = [LayerEntry(workload, layer) for layer in layers]
    found = {entry: context.timer.ask(LayerTask(entry, TimerStep.ADMIT)) for entry in entries}

    def sample(entry: LayerEntry) -> LayerResult | None:
        now = context.timer.ask(LayerTask(entry, TimerStep.SAMPLE))
        if now.failure is None:
            return now
        found[entry] += now
        return None

    admitted = [entry for entry in entries if found[entry].failure is None]
    for entry, samples in in_rounds(admitted, sample, range(ROUNDS), seed).items():
        found[entry] += samples
    return [_times(entry, found[entry], context, seed) for entry in entries]


def _times(entry: LayerEntry, found: LayerResult, context: LayerContext, seed: int) -> LayerTimes:
    if found.failure is not None:
        return LayerTimes(entry, found)
    samples = (found.forward_ms, found.step_ms, found.captured_ms)
    forward, step, captured = (estimate(ms, seed) if ms else None for ms in samples)
    peaks = peaks_of(context.device.name)
    floor = 1e3 * found.traffic / peaks.bytes_per_second if found.traffic and peaks is not None else None
    return LayerTimes(entry, found, forward, step, captured, floor)
