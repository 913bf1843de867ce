"""The suite says the same on a machine of any speed: no test looks at the host's clock, or is in a hurry."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support import ROOT

TESTS = sorted(path for path in (ROOT / "tests").glob("*.py") if path.name != "sanitize.py")
"""Those that run without a GPU; on one, m2gen's own clock is under test, and ``sanitize.py`` is a tool."""
CLOCKS = {"time", "monotonic", "perf_counter", "process_time", "thread_time", "monotonic_ns", "perf_counter_ns"}
LONG = 1800
"""Seconds that only what hangs takes."""
MACHINERY = {"deadline", "suppress_health_check", "derandomize", "database"}
"""Settings of hypothesis that the profile has, and an example's settings would replace."""


def calls(path: Path) -> Iterator[ast.Call]:
    """Yield every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node


def name_of(function: ast.expr) -> str:
    """Return ``module.name`` of what is called, as it is written."""
    return ast.unparse(function)


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_no_test_depends_on_speed(path: Path) -> None:
    """Clocks are simulated, a sleep is for ever, and a limit only ends what hangs."""
    for call in calls(path):
        called = name_of(call.func)
        assert called.removeprefix("time.") not in CLOCKS or "." not in called, f"{path}:{call.lineno}: {called}"
        if called in ("time.sleep", "sleep"):
            (seconds,) = call.args
            assert isinstance(seconds, ast.Constant), f"{path}:{call.lineno}: {ast.unparse(call)}"
            assert seconds.value >= LONG, f"{path}:{call.lineno}: {ast.unparse(call)}"
        for keyword in call.keywords:
            if keyword.arg == "timeout" and isinstance(keyword.value, ast.Constant):
                assert keyword.value.value >= LONG, f"{path}:{call.lineno}: {ast.unparse(call)}"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_examples_have_the_profile(path: Path) -> None:
    """A test of its own mind would have a deadline again, or health checks that are about time."""
    for call in calls(path):
        if name_of(call.func) == "settings":
            assert not MACHINERY & {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"


def test_the_profile(request: pytest.FixtureRequest) -> None:
    """No deadline, no health check about time, the same examples each time, none kept; whoever asks gets another."""
    profile = settings.get_profile("ci")
    assert (profile.deadline, profile.derandomize, profile.database) == (None, True, None)
    assert set(profile.suppress_health_check) == {HealthCheck.too_slow}
    assert settings.default == settings.get_profile(request.config.getoption("hypothesis_profile") or "ci")
