"""Time a candidate's forward and backward by the GPU's clock, slow candidates with few samples."""

from __future__ import annotations

from typing import Any, Protocol

from m2gen.measure.clock import Clock, Replay, peak_bytes
from m2gen.tune.trial import Samples

FEWEST, MOST = 5, 30
"""Bounds on the number of samples in the screening."""
AGAIN = 10
"""Number of samples of a finalist in one round."""
FAR_SLOWER = 1.4
"""Multiple of the best median beyond which a candidate gets only a few samples."""


class Trainable(Protocol):
    """A call whose forward and backward are timed."""

    @property
    def trains(self) -> bool:
        """Whether there is a backward."""

    def forward(self) -> Any: ...
    def backward_of(self, results: Any) -> object:
        """Return the gradients, after a forward that gave ``results``."""


def captured(call: Trainable) -> Clock:
    """Capture a candidate's forward and backward on the problem of the search."""
    extra_bytes = peak_bytes(lambda: _run(call))
    forward = Replay(call.forward)
    replays: list[Replay[Any]] = [forward]
    if call.trains:
        replays.append(Replay(lambda: call.backward_of(forward.results)))
    return Clock(replays, extra_bytes)


def screened(clock: Clock, best_ms: float | None) -> Samples:
    """Sample a candidate for the first time, with few samples if it is far slower than the best."""
    worth_ms = FAR_SLOWER * best_ms if best_ms else float("inf")
    return _samples(clock.sample(FEWEST, MOST, worth_ms), clock)


def sampled(clock: Clock) -> Samples:
    """Sample a finalist for one round."""
    return _samples(clock.sample(AGAIN, AGAIN), clock)


def _samples(calls: list[tuple[float, ...]], clock: Clock) -> Samples:
    return Samples(tuple(call[0] for call in calls), tuple(call[1] for call in calls if call[1:]), clock.extra_bytes)


def _run(call: Trainable) -> object:
    results = call.forward()
    return results, call.backward_of(results) if call.trains else None
