"""How long a candidate takes: its forward and backward by the GPU's clock, for as long as it is worth."""

from __future__ import annotations

from typing import Any

from m2gen.measure.clock import Clock, Replay, peak_bytes
from m2gen.spec import Objective
from m2gen.tune.candidate import KernelCall
from m2gen.tune.trial import Samples

FEWEST, MOST = 5, 30
"""Samples of a screening."""
AGAIN = 10
"""Samples of one round of a finalist."""
FAR_SLOWER = 1.4
"""Times the best median, beyond which a candidate is not worth more than a few samples."""


def captured(call: KernelCall) -> Clock:
    """Capture a candidate's forward and backward on the problem that is tuned for."""
    extra_bytes = peak_bytes(lambda: _run(call))
    forward = Replay(call.forward)
    replays: list[Replay[Any]] = [forward]
    if call.objective is Objective.TRAIN:
        replays.append(Replay(lambda: call.backward(forward.results[2])))
    return Clock(replays, extra_bytes)


def screened(clock: Clock, best_ms: float | None) -> Samples:
    """Sample a candidate for the first time; only a few times where it is far slower than the best."""
    worth_ms = FAR_SLOWER * best_ms if best_ms else float("inf")
    return _samples(clock.sample(FEWEST, MOST, worth_ms), clock)


def sampled(clock: Clock) -> Samples:
    """Sample a finalist for one round."""
    return _samples(clock.sample(AGAIN, AGAIN), clock)


def _samples(calls: list[tuple[float, ...]], clock: Clock) -> Samples:
    return Samples(tuple(call[0] for call in calls), tuple(call[1] for call in calls if call[1:]), clock.extra_bytes)


def _run(call: KernelCall) -> object:
    results = call.forward()
    return results, call.backward(results[2]) if call.objective is Objective.TRAIN else None
