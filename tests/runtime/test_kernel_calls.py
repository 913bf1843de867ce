"""Calls with any strides, in pieces and without sequences; and verification notices broken kernels."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from calls import DIFFERENTIABLE, PER_SEQUENCE, STEPWISE, Operator, arguments, assert_close, assert_same, changed
from calls import differentiate as results_of
from support import OPERANDS, build_package, import_package, make_schedule, make_variant
from torch import Tensor

from m2gen.problem import Inputs, Problem, make_inputs
from m2gen.verify import Case, run_case

VARIANT = make_variant()
STEPS = 4
TENSORS = (*DIFFERENTIABLE, "dy", "dstate")
Layout = Callable[[Tensor], Tensor]


def _strided(x: Tensor) -> Tensor:
    """Return x as every other element of a wider tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    return wide[..., ::2]


def _transposed(x: Tensor) -> Tensor:
    """Return x with its second and third dims swapped in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _last_dim_first(x: Tensor) -> Tensor:
    """Return x with its last dim outermost in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def _sliced(x: Tensor) -> Tensor:
    """Return x as the middle slice of a fused projection's last dim."""
    pad = x.new_full((*x.shape[:-1], 3), float("nan"))
    return torch.cat([pad, x, pad], -1)[..., 3:-3]


def _reversed_in_memory(x: Tensor) -> Tensor:
    """Return x with its first and second dims swapped in memory: step-major, as recurrent code has it."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = {
    "strided": _strided,
    "transposed": _transposed,
    "last_dim_first": _last_dim_first,
    "sliced": _sliced,
    "step_major": _reversed_in_memory,
}


@pytest.fixture(scope="module")
def inputs(device: torch.device) -> Inputs:
    """Return the operands of two short sequences."""
    return make_inputs(VARIANT, Problem(2, STEPS, initial_state=True), seed=3).to(device)


@pytest.fixture(scope="module")
def package(modules) -> ModuleType:
    """Return a package whose sums do not depend on the order of programs."""
    return modules("two_level_partial", "carry")


@pytest.fixture(scope="module")
def plain(package, inputs) -> dict[str, Tensor]:
    """Return the results and gradients of contiguous operands."""
    return results_of(package.m2rnn, inputs)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_strides_give_the_same_bits(package, inputs, plain, layout) -> None:
    """All operands and incoming gradients at once in another memory layout change no bit of any result."""
    laid_out = changed(inputs, TENSORS, layout)
    moved = [name for name, x in arguments(laid_out, (*OPERANDS, "dy", "dstate")).items() if not x.is_contiguous()]
    assert len(moved) >= 6
    assert_same(results_of(package.m2rnn, laid_out), plain)


def test_expanded_operands_of_stride_zero(package, inputs) -> None:
    """One step's operands, and one state, expanded over all steps, sequences and heads equal their copies."""
    expanded = changed(inputs, STEPWISE, lambda x: x[:1, :1, :1].expand(x.shape))
    expanded = changed(expanded, PER_SEQUENCE, lambda x: x[:1, :1].expand(x.shape))
    expanded = changed(expanded, ("weight",), lambda x: x[:1].expand(x.shape))
    assert not expanded.dy.is_contiguous()
    copied = changed(expanded, TENSORS, lambda x: x.contiguous())
    assert_same(results_of(package.m2rnn, expanded), results_of(package.m2rnn, copied))


def test_a_sum_of_y_has_an_expanded_gradient(package, inputs) -> None:
    """``y.sum().backward()`` hands over a dy of stride 0 everywhere."""
    ones = changed(inputs, ("dy",), lambda x: torch.ones((), device=x.device).expand(x.shape))
    assert ones.dy.stride() == (0, 0, 0, 0)
    copied = changed(ones, ("dy",), lambda x: x.contiguous())
    assert_same(results_of(package.m2rnn, ones), results_of(package.m2rnn, copied))


def _in_pieces(operator: Operator, pieces: tuple[int, ...]) -> Operator:
    """Return an operator that calls ``operator`` on one piece of the steps after the other."""

    def call(q, k, v, weight, forget, initial_state):
        outputs, state = [], initial_state
        for q_, k_, v_, f_ in zip(*(x.split(pieces, 1) for x in (q, k, v, forget)), strict=True):
            y, state = operator(q_, k_, v_, weight, f_, state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    return call


@pytest.mark.parametrize("clip", ["carry", "total"])
@pytest.mark.parametrize("pieces", [(1, 0, STEPS - 1), (2, 2), (1,) * STEPS], ids=str)
def test_pieces_equal_one_call(modules, inputs, pieces, clip) -> None:
    """A sequence handed over in pieces, state by state, gives the same results and gradients."""
    operator = modules("two_level_partial", clip).m2rnn
    assert_close(results_of(_in_pieces(operator, pieces), inputs), results_of(operator, inputs), 1e-6)


def test_no_sequences_at_all(package, device) -> None:
    """A batch of 0 gives empty results, and gradients of zeros for the weight."""
    empty = make_inputs(VARIANT, Problem(0, 3, initial_state=True), seed=0).to(device)
    results = results_of(package.m2rnn, empty)
    assert results["y"].shape == (0, 3, 2, 16)
    assert results["state"].shape == (0, 2, 16, 16)
    assert all(results[f"d{name}"].shape == getattr(empty, name).shape for name in OPERANDS)
    assert not results["dweight"].any()


SABOTAGE = {
    "gate_factor": ("slope_0 = u_0 - u_0 *", "slope_0 = 1.0 -", {"dk", "dv", "dweight", "dforget", "dinitial_state"}),
    "tanh_derivative": ("u_1 - u_1 * z_1 * z_1", "u_1", {"dk", "dv", "dweight", "dforget", "dinitial_state"}),
    "clamp": ("g = clamp(c, bound)", "g = c", {"dk", "dv", "dweight", "dforget", "dinitial_state"}),
    "own_state": ("dq_0 = tl.sum(h_1 *", "dq_0 = tl.sum(h_0 *", {"dq"}),
    "gradient_of_carry": (
        "c = tl.fma(f_0, g,",
        "c = tl.fma(1.0, g,",
        {"dk", "dv", "dweight", "dforget", "dinitial_state"},
    ),
    "store_of_dq": ("tl.store(dq +", None, {"dq"}),
    "store_of_state": ("tl.store(ht +", None, {"state"}),
    "output": ("y_1 = tl.sum(column(q_1", "y_1 = tl.sum(column(q_0", {"y"}),
}
"""Changes that break a kernel, and the results that each must push over budget."""


def _broken(source: str, old: str, new: str | None) -> str:
    """Replace a text that a kernel must hold, or the whole statement that it begins where ``new`` is None."""
    assert old in source, f"the templates no longer write {old!r}: update SABOTAGE"
    return source.replace(old, new) if new is not None else re.sub(rf"{re.escape(old)}.*", "pass", source)


def _sabotaged(name: str, folder: Path) -> ModuleType:
    """Return a package whose kernels were broken as SABOTAGE says."""
    old, new, _ = SABOTAGE[name]
    schedule = make_schedule("partial")
    package = build_package(f"sabotage_{name}", [make_variant(heads=(2, 2, 2, 2, 2))], schedule)
    path = next(path for path in package.files if path.startswith("kernels/k"))
    files = {**package.files, path: _broken(package.files[path], old, new)}
    package = replace(package, files=files)
    return import_package(folder / name, package)


@pytest.mark.parametrize("name", SABOTAGE)
def test_verification_catches_broken_kernels(name, tmp_path, device) -> None:
    """One wrong factor, operand or missing store puts exactly the results that depend on it over budget."""
    variant = make_variant(heads=(2, 2, 2, 2, 2))
    case = Case("test", Problem(1, 7, initial_state=True), dy_scale=3.0)
    report = run_case(_sabotaged(name, tmp_path), variant, case, 0, device)
    assert report.failure == ""
    over = {result.tensor for result in report.results if not result.passed}
    assert over == SABOTAGE[name][2]
