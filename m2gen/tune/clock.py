"""How long a candidate takes: its forward and backward by the GPU's clock, for as long as it is worth."""

from __future__ import annotations

from statistics import median
from typing import Any

from m2gen.measure.clock import Replay, peak_bytes, timed, warm
from m2gen.spec import Objective
from m2gen.tune.candidate import Call
from m2gen.tune.trial import Samples

COUNTED_SECONDS = 0.15
FEWEST, MOST = 5, 30
FAR_SLOWER = 1.4
"""Times the best median, beyond which a candidate is not worth more than a few samples."""


class Clock:
    """A candidate's forward and backward on the problem that is tuned for, captured once and replayed."""

    def __init__(self, call: Call) -> None:
        self.peak_bytes = peak_bytes(lambda: _run(call))
        forward = Replay(call.forward)
        self._replays: list[Replay[Any]] = [forward]
        if call.objective is Objective.TRAIN:
            self._replays.append(Replay(lambda: call.backward(forward.results[2])))

    def screen(self, best_ms: float | None) -> Samples:
        """Warm up and sample; only a few times where the candidate is far slower than the best."""
        estimate = median(map(sum, warm(self._replays)))
        count = min(MOST, max(FEWEST, int(COUNTED_SECONDS * 1e3 / estimate)))
        return self.sample(FEWEST if best_ms and estimate > FAR_SLOWER * best_ms else count)

    def again(self, count: int) -> Samples:
        """Warm up and sample ``count`` calls."""
        warm(self._replays)
        return self.sample(count)

    def sample(self, count: int) -> Samples:
        """Return the times of ``count`` calls."""
        turns = timed(self._replays, count)
        return Samples(tuple(turn[0] for turn in turns), tuple(turn[1] for turn in turns if turn[1:]), self.peak_bytes)


def _run(call: Call) -> object:
    results = call.forward()
    return results, call.backward(results[2]) if call.objective is Objective.TRAIN else None
