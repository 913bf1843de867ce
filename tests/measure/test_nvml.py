"""Clocks, throttling and the driver, by a library that says what a script says."""

from __future__ import annotations

import sys

import pytest
from scripted_nvml import BITS, MEMORY_MHZ, MOST_MHZ, Script, install

from m2gen.db import Clocks, Throttled, ThrottleReason
from m2gen.measure import nvml
from m2gen.measure.nvml import ClockWatch

UUID = "GPU-8f2a0a3e-0000-1111-2222-333344445555"
NAME = UUID.replace("GPU-", "gpu-")


def watched(script: Script, readings: int) -> Clocks | None:
    """Return what a watch found that was let read so often."""
    with ClockWatch(NAME, 0.0) as watch:
        for _ in range(readings):
            script.await_reading()
    return watch.clocks


def test_clocks_are_medians_and_reasons_parts_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle readings do not count; the GPU is asked for by its UUID, and the library is let go of."""
    readings = [(345, "GpuIdle"), *[(1980, "")] * 2, (1500, "SwPowerCap"), (1200, "HwSlowdown HwThermalSlowdown")]
    script = install(monkeypatch, Script([*readings, (345, "GpuIdle ApplicationsClocksSetting")], UUID))
    reasons = (ThrottleReason.HARDWARE, ThrottleReason.HEAT, ThrottleReason.POWER)
    expected = Clocks(1500, MOST_MHZ, MEMORY_MHZ, tuple(Throttled(reason, 0.25) for reason in sorted(reasons)))
    assert watched(script, 5) == expected
    assert expected.warning == (
        "the GPU was throttled, 25% of the time by hardware, 25% of the time by heat, 25% of the time by power "
        "(1500 of 1980 MHz): times may not repeat"
    )
    assert (script.asked, script.open) == ([UUID], 0)


def test_clocks_are_read_when_a_watch_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """However far apart readings are, there is one when it begins and one when it ends."""
    script = install(monkeypatch, Script([(345, "GpuIdle"), (1500, "SwPowerCap")]))
    with ClockWatch(NAME, 3600.0) as watch:
        script.await_reading()
    assert watch.clocks == Clocks(1500, MOST_MHZ, MEMORY_MHZ, (Throttled(ThrottleReason.POWER, 1.0),))


def test_the_highest_clock_is_no_lower_than_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver may run a GPU above the clock that it says is the highest."""
    found = watched(install(monkeypatch, Script([(MOST_MHZ + 15, "")])), 1)
    assert found == Clocks(MOST_MHZ + 15, MOST_MHZ + 15, MEMORY_MHZ)


def test_a_moment_of_throttling_is_a_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One reading of thousands is more than nothing, which no record could hold."""
    readings = [(1980, "")] * 2400
    found = watched(install(monkeypatch, Script([(1500, "SwPowerCap"), *readings], UUID)), 2401)
    assert found is not None
    assert found.throttled == (Throttled(ThrottleReason.POWER, 0.001),)


@pytest.mark.parametrize("reason", ["", "ApplicationsClocksSetting"])
def test_clocks_that_somebody_set_are_no_throttling(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locked clocks are what was asked for."""
    found = watched(install(monkeypatch, Script([(1200, reason)])), 2)
    assert found == Clocks(1200, MOST_MHZ, MEMORY_MHZ)
    assert found.warning == ""


@pytest.mark.parametrize("name", [name for name in BITS if name not in ("GpuIdle", "ApplicationsClocksSetting")])
def test_every_reason_is_throttling(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever slows a GPU down is said."""
    found = watched(install(monkeypatch, Script([(1200, name)])), 1)
    assert found is not None
    assert "100% of the time" in found.warning


@pytest.mark.parametrize(
    "script",
    [
        Script(uuid="GPU-another"),
        Script([(345, "GpuIdle")]),
        Script([(0, "")]),
        *(Script(missing=frozenset({name})) for name in ("nvmlInit", "nvmlDeviceGetCurrentClocksEventReasons")),
    ],
    ids=["another GPU", "idle", "no clocks", "no driver", "old driver"],
)
def test_what_is_not_known_is_none(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another maker's GPU, a driver that does not say, or a GPU that did nothing: no clocks, and no error."""
    install(monkeypatch, script)
    with ClockWatch(NAME, 0.0) as watch:
        pass
    assert watch.clocks is None
    assert script.open == 0


def test_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version as the library has it; empty without a driver, or without the library."""
    install(monkeypatch, Script())
    assert nvml.driver() == "570.86.15"
    for missing in ("nvmlInit", "nvmlSystemGetDriverVersion"):
        install(monkeypatch, Script(missing=frozenset({missing})))
        assert nvml.driver() == ""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.driver() == ""


def test_the_script_is_like_the_library() -> None:
    """The fake has the names and the bits of the real library."""
    pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py (pip install m2gen)")
    assert {name: getattr(pynvml, f"nvmlClocksEventReason{name}") for name in BITS} == BITS
    for name in ("nvmlInit", "nvmlShutdown", "nvmlSystemGetDriverVersion", "nvmlDeviceGetHandleByUUID"):
        assert callable(getattr(pynvml, name))
    for name in ("MaxClockInfo", "ClockInfo", "CurrentClocksEventReasons"):
        assert callable(getattr(pynvml, f"nvmlDeviceGet{name}"))
    assert (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM) == (1, 2)
    assert nvml.driver() == "" or nvml.driver()[0].isdigit()
