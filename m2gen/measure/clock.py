"""Time calls on a CUDA GPU: graphs of them, replayed with a cold L2 and warm clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Generic, Protocol, TypeAlias, TypeVar

import torch

Result = TypeVar("Result")
Span: TypeAlias = tuple[torch.cuda.Event, torch.cuda.Event]
"""The events around one call."""
now = time.monotonic
"""The host's clock."""
WARM_SECONDS = 0.04
"""Seconds of warm-up replays: a GPU that waited for a compiler has lowered its clocks."""
COUNTED_SECONDS = 0.15
"""Seconds of calls that are sampled, within the bounds on their number."""
L2_TIMES = 3
"""Size of the buffer that is written between calls, as a multiple of the L2's size."""


class Timed(Protocol):
    """Something whose runs on the GPU can be timed."""

    def enqueue(self) -> Span: ...


class Direct:
    """A call that the host makes anew each time, as a program that captures nothing does."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run

    def enqueue(self) -> Span:
        """Enqueue a cold call between two events, which also counts what the GPU waits for the host."""
        return _between_events(self._run)


class Replay(Generic[Result]):
    """A call captured in a CUDA graph; every replay overwrites ``results``, which the captured call returned."""

    def __init__(self, run: Callable[[], Result]) -> None:
        self._run = run  # keeps the operands alive, whose memory every replay reads
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.results = run()

    def enqueue(self) -> Span:
        """Enqueue a cold replay between two events; the host is ahead, so the GPU never waits for it."""
        return _between_events(self._graph.replay)


def _between_events(run: Callable[[], object]) -> Span:
    _flush_buffer().zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    return start, end


def timed(replays: Sequence[Timed], count: int) -> list[tuple[float, ...]]:
    """Return the milliseconds of each replay in ``count`` calls, each after the L2 was flushed."""
    calls = [[replay.enqueue() for replay in replays] for _ in range(count)]
    torch.cuda.synchronize()
    return [tuple(start.elapsed_time(end) for start, end in call) for call in calls]


def warm(replays: Sequence[Timed]) -> list[tuple[float, ...]]:
    """Replay at least once, until the GPU's clocks are up, and return the times in milliseconds."""
    found: list[tuple[float, ...]] = []
    start = now()
    while not found or now() - start < WARM_SECONDS:
        found += timed(replays, 1)
    return found


def aside(run: Callable[[], object]) -> None:
    """Run a call on a side stream, as torch requires before a backward is captured."""
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
    """Run a call once outside any graph; return its peak allocation in bytes beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    del results
    return torch.cuda.max_memory_allocated() - before


class Clock:
    """The graphs of one call, and the call's peak allocation in bytes."""

    def __init__(self, replays: Sequence[Timed], extra_bytes: int) -> None:
        self._replays = replays
        self.extra_bytes = extra_bytes

    def sample(self, fewest: int, most: int, worth_ms: float = float("inf")) -> list[tuple[float, ...]]:
        """Warm up, and return the milliseconds of each graph in ``fewest`` to ``most`` calls.

        There are as many calls as ``COUNTED_SECONDS`` hold, but the fewest if one takes longer than ``worth_ms``.
        """
        estimate = median(map(sum, warm(self._replays)))
        count = min(most, max(fewest, int(COUNTED_SECONDS * 1e3 / estimate)))
        return timed(self._replays, fewest if estimate > worth_ms else count)
