"""Sums in a fixed order: asked for by the call, by torch, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from calls import assert_close, assert_same, differentiate
from support import build_package, import_package, make_schedule, make_variant

from m2gen.problem import Inputs, Problem, make_inputs

VARIANTS = {
    "shared_q_k_w": make_variant(32, 16, (1, 2, 4, 4, 1)),
    "shared_v_f": make_variant(32, 16, (4, 4, 1, 2, 4)),
    "softplus": make_variant(32, 16, (4, 1, 2, 1, 1), gate="softplus"),
}
"""Every operand is shared by heads in one of them; two programs share each head's rows."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[str, ModuleType]:
    """Return the same package with atomics and with partial sums."""
    folder = tmp_path_factory.mktemp("reductions")
    rendered = {
        name: build_package(f"reduction_{name}", VARIANTS.values(), make_schedule(name))
        for name in ("atomic", "partial")
    }
    return {name: import_package(folder / name, package) for name, package in rendered.items()}


@pytest.fixture(params=VARIANTS)
def inputs(request: pytest.FixtureRequest, device: torch.device) -> Inputs:
    """Return the operands of one short sequence of each variant."""
    return make_inputs(VARIANTS[request.param], Problem(1, 3, initial_state=True), seed=2).to(device)


@contextmanager
def torch_deterministic(warn_only: bool) -> Iterator[None]:
    """Ask torch for deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_asked_for_by_the_call(packages, inputs) -> None:
    """``deterministic=True`` turns atomics into partial sums: the bits of a package that has no atomics."""
    given = differentiate(packages["atomic"].m2rnn, inputs, deterministic=True)
    assert_same(given, differentiate(packages["partial"].m2rnn, inputs, deterministic=False))


@pytest.mark.parametrize("warn_only", [False, True])
def test_asked_for_by_torch(packages, inputs, warn_only) -> None:
    """``torch.use_deterministic_algorithms`` does what the argument does, unless the call says otherwise."""
    expected = differentiate(packages["atomic"].m2rnn, inputs, deterministic=True)
    with torch_deterministic(warn_only):
        assert_same(differentiate(packages["atomic"].m2rnn, inputs), expected)


def test_the_default_differs_by_rounding(packages, inputs) -> None:
    """Atomics give the same sums to float32's rounding of a few terms."""
    given = differentiate(packages["atomic"].m2rnn, inputs)
    assert_close(given, differentiate(packages["partial"].m2rnn, inputs), 8 * torch.finfo(torch.float32).eps)


class _Atomics:
    """Counts the atomics that the interpreter runs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.count = 0
        create = InterpreterBuilder.create_atomic_rmw

        def counting(*arguments):
            self.count += 1
            return create(*arguments)

        patch.setattr(InterpreterBuilder, "create_atomic_rmw", counting)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter runs")
def test_no_atomic_runs(packages, inputs, monkeypatch) -> None:
    """The default mode runs atomics here; neither way to ask for determinism runs one, forward or backward."""
    atomics = _Atomics(monkeypatch)
    operator = packages["atomic"].m2rnn
    differentiate(operator, inputs)
    assert atomics.count
    atomics.count = 0
    differentiate(operator, inputs, deterministic=True)
    with torch_deterministic(warn_only=False):
        differentiate(operator, inputs)
        assert atomics.count == 0
        differentiate(operator, inputs, deterministic=False)
    assert atomics.count


def test_the_documentation_names_what_may_vary(packages) -> None:
    """The docstring of a package names every result that atomics sum."""
    assert "last bits may vary of y, dq, dk, dv, df" in " ".join(packages["atomic"].__doc__.split())
    assert "last bits may vary of no result." in " ".join(packages["partial"].__doc__.split())
