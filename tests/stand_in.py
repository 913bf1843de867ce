"""A stand-in for a CUDA GPU, for tests of the clock: graphs whose replays sleep, memory that grows at every look."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import m2gen.measure.clock


class _Event:
    """A time as the host sees it."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.monotonic()

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) * 1e3


class _Graph:
    """A graph whose replays take a millisecond."""

    replays = 0

    def replay(self) -> None:
        _Graph.replays += 1
        time.sleep(1e-3)


class _Stream:
    """A stream that waits for nothing."""

    def wait_stream(self, other: object) -> None: ...


def stand_in_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what the clock asks of torch.cuda, on a CPU whose kernels the interpreter runs."""

    @contextmanager
    def capture(_: object) -> Iterator[None]:
        yield

    def nothing(*_: object) -> None: ...

    memory = iter(range(0, 10**9, 1000))
    for name, value in {
        "CUDAGraph": _Graph,
        "Event": _Event,
        "graph": capture,
        "stream": capture,
        "Stream": _Stream,
        "current_stream": _Stream,
        "synchronize": nothing,
        "reset_peak_memory_stats": nothing,
        "empty_cache": nothing,
        "memory_allocated": lambda: next(memory),
        "max_memory_allocated": lambda: next(memory),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(m2gen.measure.clock, "_FLUSH", [torch.empty(8)])
    monkeypatch.setattr(m2gen.measure.clock, "WARM_SECONDS", 0.01)
