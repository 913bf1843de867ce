"""How long calls take on a CUDA GPU: graphs of them, replayed with a cold L2 and warm clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Generic, TypeVar

import torch

Result = TypeVar("Result")
now = time.monotonic
"""The host's clock."""
WARM_SECONDS = 0.04
"""Of replays before the first that counts: a GPU that waited for a compiler has lowered its clocks."""
COUNTED_SECONDS = 0.15
"""Of calls that count, as far as the bounds on their number allow."""
L2_TIMES = 3
"""Size of the buffer that is written between calls, in sizes of the L2."""


class Replay(Generic[Result]):
    """A call captured once; every replay writes the memory of ``results``, which the captured run returned."""

    def __init__(self, run: Callable[[], Result]) -> None:
        self._run = run  # has the operands, whose memory every replay reads: nobody else may keep them
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.results = run()

    def enqueue(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Enqueue a cold replay between two events; the host is ahead, so the GPU never waits for it."""
        _flush_buffer().zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        self._graph.replay()
        end.record()
        return start, end


def timed(replays: Sequence[Replay[Result]], count: int) -> list[tuple[float, ...]]:
    """Return the milliseconds of each replay in ``count`` calls, each after the L2 was filled with something else."""
    calls = [[replay.enqueue() for replay in replays] for _ in range(count)]
    torch.cuda.synchronize()
    return [tuple(start.elapsed_time(end) for start, end in call) for call in calls]


def warm(replays: Sequence[Replay[Result]]) -> list[tuple[float, ...]]:
    """Replay until the GPU's clocks are up, at least once, and return the times."""
    found: list[tuple[float, ...]] = []
    start = now()
    while not found or now() - start < WARM_SECONDS:
        found += timed(replays, 1)
    return found


def aside(run: Callable[[], object]) -> None:
    """Run a call on a stream of its own, as torch asks for before a backward is captured."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)


_FLUSH: list[torch.Tensor] = []


def _flush_buffer() -> torch.Tensor:
    if not _FLUSH:
        size = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0) or 64 << 20
        _FLUSH.append(torch.empty(L2_TIMES * size, dtype=torch.int8, device="cuda"))
    return _FLUSH[0]


def peak_bytes(run: Callable[[], object]) -> int:
    """Run a call once outside any graph; return what it allocates at most beyond what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    del results
    return torch.cuda.max_memory_allocated() - before


class Clock:
    """Graphs that together are one call, and what that allocates at most beyond what is there."""

    def __init__(self, replays: Sequence[Replay[Any]], extra_bytes: int) -> None:
        self._replays = replays
        self.extra_bytes = extra_bytes

    def sample(self, fewest: int, most: int, worth_ms: float = float("inf")) -> list[tuple[float, ...]]:
        """Warm up, and return the milliseconds of each graph in ``fewest`` to ``most`` calls.

        As many as ``COUNTED_SECONDS`` hold; the fewest of a call that takes longer than ``worth_ms``.
        """
        estimate = median(map(sum, warm(self._replays)))
        count = min(most, max(fewest, int(COUNTED_SECONDS * 1e3 / estimate)))
        return timed(self._replays, fewest if estimate > worth_ms else count)
