"""The suite says the same on a machine of any speed: no test looks at the host's clock, or is in a hurry."""

from __future__ import annotations

import ast
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from leftovers import kept_registries, left, registries, state
from support import ROOT

FOLDERS = [place for place in (ROOT / "tests").iterdir() if place.name not in ("golden", "gpu", "__pycache__")]
TESTS = sorted(path for place in FOLDERS for path in (place.rglob("*.py") if place.is_dir() else [place]))
"""Those that run without a GPU; on one, m2gen's own clock is under test."""
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


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT / "tests")))
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


def outcomes(test: ast.expr) -> Iterator[ast.expr]:
    """Yield what an assertion may come down to: each alternative of an ``if``, each operand of ``and`` and ``or``."""
    if isinstance(test, ast.IfExp):
        yield from (*outcomes(test.body), *outcomes(test.orelse))
    elif isinstance(test, ast.BoolOp):
        for value in test.values:
            yield from outcomes(value)
    else:
        yield test


def hollow(source: str) -> list[int]:
    """Return lines of assertions that a constant may decide: ``assert x <= 1 if y else 2`` holds where y does not."""
    asserted = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert))
    return [n.lineno for n in asserted if any(isinstance(x, (ast.Constant, ast.Tuple)) for x in outcomes(n.test))]


@pytest.mark.parametrize("path", [*TESTS, *sorted((ROOT / "tests" / "gpu").glob("*.py"))], ids=lambda path: path.stem)
def test_no_assertion_is_hollow(path: Path) -> None:
    """None says something of one case alone, and nothing of the other."""
    assert hollow(path.read_text(encoding="utf-8")) == []


def test_hollow_assertions_are_found() -> None:
    """A number in place of a comparison, a message in place of a condition, and what is always so."""
    kinds = [
        "x <= 1 if y else 2",
        "x, 'message'",
        "(x, 'message')",
        "x or 1",
        "True",
        "x <= (1 if y else 2)",
        "x == ()",
    ]
    assert [bool(hollow(f"assert {kind}")) for kind in kinds] == [True, False, True, True, True, False, False]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT / "tests")))
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


def _sets_a_variable(patch: pytest.MonkeyPatch) -> str:
    patch.setenv("M2GEN_LEFT", "1")
    return "os.environ['M2GEN_LEFT']"


def _looks_elsewhere(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(sys, "path", [*sys.path, "elsewhere"])
    return "sys.path"


def _goes_elsewhere(patch: pytest.MonkeyPatch) -> str:
    patch.chdir(os.sep)
    return "working directory"


def _puts_another_in_place(patch: pytest.MonkeyPatch) -> str:
    patch.setattr("m2gen.cache.cache_dir", lambda: None)
    return "m2gen.cache.cache_dir"


CHANGES = [_sets_a_variable, _looks_elsewhere, _goes_elsewhere, _puts_another_in_place]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_file_leaves_is_named(change, monkeypatch) -> None:
    """The check at the end of each file names what was changed, and nothing where that was undone."""
    before = state()
    with monkeypatch.context() as patch:
        name = change(patch)
        assert set(left(before, state())) == {name}
    assert left(before, state()) == {}


def test_a_default_of_torch_that_is_left_is_named() -> None:
    """The same of settings of torch."""
    before, dtype = state(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert set(left(before, state())) == {"default dtype"}
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this CPU cannot round denormals to zero")
def test_denormals_that_are_left_at_zero_are_named() -> None:
    """Arithmetic of the whole thread, which an example or a library compiled for speed may change."""
    before = state()
    torch.set_flush_denormal(True)
    try:
        assert set(left(before, state())) == {"denormals"}
    finally:
        torch.set_flush_denormal(False)


def test_auto_classes_forget_what_was_registered() -> None:
    """A package that registers its models in one file is no other file's."""
    auto = pytest.importorskip("transformers", reason="transformers is not installed")

    class Config(auto.PretrainedConfig):
        model_type = "m2gen_left"

    with kept_registries():
        auto.AutoConfig.register("m2gen_left", Config)
        assert any("m2gen_left" in registry for registry in registries())
    assert not any("m2gen_left" in registry for registry in registries())


@pytest.mark.parametrize("again", [False, True])
def test_every_test_draws_the_same(again) -> None:
    """Numbers of torch and of Python are those that a test alone would draw."""
    expected = torch.Generator().manual_seed(0)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    assert random.random() == random.Random(0).random()
