"""How long a candidate takes on a CUDA GPU: graphs of its calls, replayed with a cold L2 and warm clocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

import torch

from m2gen.spec import Objective
from m2gen.tune.candidate import Call
from m2gen.tune.trial import Samples

Result = TypeVar("Result")
WARM_SECONDS = 0.04
"""Of replays before the first that counts: a GPU that waited for a compiler has lowered its clocks."""
COUNTED_SECONDS = 0.15
FEWEST, MOST = 5, 30
FAR_SLOWER = 1.4
"""Times the best median, beyond which a candidate is not worth more than a few samples."""
L2_TIMES = 3
"""Size of the buffer that is written between calls, in sizes of the L2."""


class Clock:
    """A candidate's forward and backward on the problem that is tuned for, captured once and replayed."""

    def __init__(self, call: Call) -> None:
        self.peak_bytes = _peak(call)
        self._forward, (_, _, self._saved) = _captured(call.forward)
        self._backward: torch.cuda.CUDAGraph | None = None
        if call.objective is Objective.TRAIN:
            saved = self._saved
            self._backward, self._gradients = _captured(lambda: call.backward(saved))

    def screen(self, best_ms: float | None) -> Samples:
        """Warm up and sample; only a few times where the candidate is far slower than the best."""
        estimate = median(self._warm())
        count = min(MOST, max(FEWEST, int(COUNTED_SECONDS * 1e3 / estimate)))
        return self.sample(FEWEST if best_ms and estimate > FAR_SLOWER * best_ms else count)

    def again(self, count: int) -> Samples:
        """Warm up and sample ``count`` calls."""
        self._warm()
        return self.sample(count)

    def _warm(self) -> list[float]:
        found: list[float] = []
        start = time.monotonic()
        while not found or time.monotonic() - start < WARM_SECONDS:
            found += self.sample(1).call_ms
        return found

    def sample(self, count: int) -> Samples:
        """Return the times of ``count`` calls, each after the L2 was filled with something else."""
        pairs = [(_timed(self._forward), _timed(self._backward)) for _ in range(count)]
        torch.cuda.synchronize()
        forward = tuple(start.elapsed_time(end) for start, end in (one for one, _ in pairs if one))
        backward = tuple(start.elapsed_time(end) for start, end in (other for _, other in pairs if other))
        return Samples(forward, backward, self.peak_bytes)


def _timed(graph: torch.cuda.CUDAGraph | None) -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
    """Enqueue a cold replay between two events; the host is ahead, so the GPU never waits for it."""
    if graph is None:
        return None
    _flush_buffer().zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    return start, end


_FLUSH: list[torch.Tensor] = []


def _flush_buffer() -> torch.Tensor:
    if not _FLUSH:
        size = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0) or 64 << 20
        _FLUSH.append(torch.empty(L2_TIMES * size, dtype=torch.int8, device="cuda"))
    return _FLUSH[0]


def _peak(call: Call) -> int:
    """Run the call once outside any graph; return what it allocates at most beyond its inputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call.forward()
    gradients = call.backward(results[2]) if call.objective is Objective.TRAIN else None
    torch.cuda.synchronize()
    del results, gradients
    return torch.cuda.max_memory_allocated() - before


def _captured(run: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Return a graph of ``run`` and what the captured run returned, whose memory the graph writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results
