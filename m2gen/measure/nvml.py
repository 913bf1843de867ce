"""What NVIDIA's management library says of a GPU: the driver, and clocks and throttling while something runs on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low
from threading import Event, Thread
from typing import Any

from m2gen.db import Clocks, Throttled, ThrottleReason

EVERY_SECONDS = 0.25
"""Time from one reading of clocks to the next."""
LONGEST_SECONDS = 5.0
"""Longest that a search waits for the last reading, should the driver hang."""
DIGITS = 3

_BITS = {
    "SwPowerCap": ThrottleReason.POWER,
    "HwPowerBrakeSlowdown": ThrottleReason.POWER,
    "SwThermalSlowdown": ThrottleReason.HEAT,
    "HwThermalSlowdown": ThrottleReason.HEAT,
    "HwSlowdown": ThrottleReason.HARDWARE,
    "SyncBoost": ThrottleReason.OTHER_GPUS,
}
"""Reasons of NVML for which clocks are below what was asked for; that a GPU is idle, or has locked clocks, is none."""


class Unavailable(Exception):
    """The library, the driver or the GPU says nothing."""


def driver() -> str:
    """Return the version of the driver, empty if it is not known."""
    try:
        with _library() as nvml:
            return str(nvml.nvmlSystemGetDriverVersion())
    except Unavailable:
        return ""


@contextmanager
def _library() -> Iterator[Any]:
    """Yield the library; raises Unavailable where there is none, and for what it cannot say."""
    try:
        import pynvml
    except ImportError as error:
        raise Unavailable from error
    try:
        pynvml.nvmlInit()
        try:
            yield pynvml
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise Unavailable from error


@dataclass(frozen=True)
class Reading:
    """The clocks of a GPU that is at work, and why they are below what was asked for."""

    sm_mhz: int
    memory_mhz: int
    reasons: frozenset[ThrottleReason]


class ClockWatch:
    """Reads a GPU's clocks in a thread while a block runs: when it begins, every ``seconds``, and when it ends."""

    def __init__(self, gpu: str, seconds: float = EVERY_SECONDS) -> None:
        """``gpu`` is the name of a GPU by its UUID; of others, and without NVIDIA's library, nothing is known."""
        self._uuid, self._seconds = f"GPU-{gpu.removeprefix('gpu-')}", seconds
        self._readings: list[Reading] = []
        self._most = 0
        self._over = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ClockWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(LONGEST_SECONDS)

    @property
    def clocks(self) -> Clocks | None:
        """Median clocks while the GPU was at work, and the part of that time that each reason held; None if unknown."""
        seen = list(self._readings)
        if not seen:
            return None
        counts = Counter(reason for reading in seen for reason in reading.reasons)
        least = 10.0**-DIGITS  # what was seen at all is not 0
        throttled = (Throttled(each, max(least, round(n / len(seen), DIGITS))) for each, n in sorted(counts.items()))
        return Clocks(
            median_low(reading.sm_mhz for reading in seen),
            max(self._most, max(reading.sm_mhz for reading in seen)),
            median_low(reading.memory_mhz for reading in seen),
            tuple(throttled),
        )

    def _watch(self) -> None:
        try:
            with _library() as nvml:
                handle = nvml.nvmlDeviceGetHandleByUUID(self._uuid)
                self._most = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
                self._read(nvml, handle)
                while not self._over.wait(self._seconds):
                    self._read(nvml, handle)
                self._read(nvml, handle)
        except Unavailable:
            return

    def _read(self, nvml: Any, handle: Any) -> None:
        bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        if bits & nvml.nvmlClocksEventReasonGpuIdle:
            return
        reasons = (reason for name, reason in _BITS.items() if bits & getattr(nvml, f"nvmlClocksEventReason{name}"))
        sm, memory = (nvml.nvmlDeviceGetClockInfo(handle, kind) for kind in (nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM))
        if sm and memory:  # else they are not known
            self._readings.append(Reading(sm, memory, frozenset(reasons)))
