"""A stand-in for a CUDA GPU, for tests of the clock: each replay takes a millisecond of a time that is counted, and
memory grows at every look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import m2gen.measure.clock
from m2gen.measure.clock import Direct

REPLAY_MS = 1.0
WARM_UPS = 10
"""Replays that a clock is warmed with, one graph at a time."""


class _Time:
    """The GPU's time, which is the host's as well: replays take all of it."""

    ms = 0.0

    @classmethod
    def seconds(cls) -> float:
        return cls.ms / 1e3


class _Event:
    """A point in that time."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = _Time.ms

    def elapsed_time(self, end: _Event) -> float:
        return end.at - self.at


class _Graph:
    """A graph whose replays take a millisecond."""

    def replay(self) -> None:
        _Time.ms += REPLAY_MS


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

    def direct(call: Direct) -> object:
        return m2gen.measure.clock._between_events(lambda: (call._run(), _Graph().replay()))

    monkeypatch.setattr(Direct, "enqueue", direct)
    monkeypatch.setattr(m2gen.measure.clock, "_FLUSH", [torch.empty(8)])
    monkeypatch.setattr(m2gen.measure.clock, "now", _Time.seconds)
    monkeypatch.setattr(m2gen.measure.clock, "WARM_SECONDS", (WARM_UPS - 0.5) * REPLAY_MS / 1e3)
