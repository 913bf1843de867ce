"""NVIDIA's management library as ``pynvml`` wraps it, for one GPU that reads as a script says. It needs no driver."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from threading import Semaphore
from types import ModuleType

import pytest

BITS = {"GpuIdle": 0x1, "ApplicationsClocksSetting": 0x2, "SwPowerCap": 0x4, "HwSlowdown": 0x8, "SyncBoost": 0x10}
BITS |= {"SwThermalSlowdown": 0x20, "HwThermalSlowdown": 0x40, "HwPowerBrakeSlowdown": 0x80}
"""Reasons, with the bits that nvml.h gives them."""
MOST_MHZ, MEMORY_MHZ = 1980, 2619


class NVMLError(Exception):
    """What every function of the library raises."""


@dataclass
class Script:
    """What the library says: readings of the SMs' clock and of reasons, of which the last goes on."""

    readings: Sequence[tuple[int, str]] = ((1755, ""),)
    uuid: str | None = None
    """The GPU that there is; any if None."""
    missing: frozenset[str] = frozenset()
    """Functions that fail, as with another driver."""
    open: int = 0
    """How often the library was initialised and not shut down."""
    asked: list[str] = field(default_factory=list)
    read: Semaphore = field(default_factory=lambda: Semaphore(0))
    """Released for every reading."""

    def await_reading(self) -> None:
        """Wait for another reading; fail where there is none, as of a watch of another GPU."""
        assert self.read.acquire(timeout=1800)


def install(patch: pytest.MonkeyPatch, script: Script) -> Script:
    """Make the script what ``import pynvml`` finds."""
    module, readings = ModuleType("pynvml"), chain(script.readings, repeat(script.readings[-1]))
    sm = [0]

    def init() -> None:
        script.open += 1

    def shutdown() -> None:
        script.open -= 1

    def handle(uuid: str) -> str:
        script.asked.append(uuid)
        if script.uuid not in (None, uuid):
            raise NVMLError("Not Found")
        return "handle"

    def reasons(handle: str) -> int:
        sm[0], names = next(readings)
        script.read.release()
        return sum(BITS[name] for name in names.split())

    functions = {
        "nvmlInit": init,
        "nvmlShutdown": shutdown,
        "nvmlSystemGetDriverVersion": lambda: "570.86.15",
        "nvmlDeviceGetHandleByUUID": handle,
        "nvmlDeviceGetMaxClockInfo": lambda handle, kind: MOST_MHZ,
        "nvmlDeviceGetClockInfo": lambda handle, kind: sm[0] if kind == 1 else MEMORY_MHZ,
        "nvmlDeviceGetCurrentClocksEventReasons": reasons,
    }

    def failing(*_: object) -> None:
        raise NVMLError("Not Supported")

    constants = {f"nvmlClocksEventReason{name}": bit for name, bit in BITS.items()}
    chosen = {name: failing if name in script.missing else function for name, function in functions.items()}
    vars(module).update({**chosen, **constants, "NVMLError": NVMLError, "NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2})
    patch.setitem(sys.modules, "pynvml", module)
    return script
