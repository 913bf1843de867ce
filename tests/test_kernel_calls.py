"""What a call may look like: strides, pieces, nothing at all; and that verification notices broken kernels."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from support import OPERANDS, build_package, import_package, make_schedule, make_variant
from torch import Tensor

from m2gen.problem import Inputs, Problem, make_inputs
from m2gen.verify import Case, Operator, run_case

VARIANT = make_variant()
STEPS = 4
Layout = Callable[[Tensor], Tensor]


def _strided(x: Tensor) -> Tensor:
    """Return x as every other element of a wider tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    return wide[..., ::2]


def _transposed(x: Tensor) -> Tensor:
    """Return x with its second and third dims swapped in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _sliced(x: Tensor) -> Tensor:
    """Return x as the middle slice of a fused projection's last dim."""
    pad = x.new_full((*x.shape[:-1], 3), float("nan"))
    return torch.cat([pad, x, pad], -1)[..., 3:-3]


LAYOUTS = {"strided": _strided, "transposed": _transposed, "sliced": _sliced}


@pytest.fixture
def inputs(device: torch.device) -> Inputs:
    """Return the operands of two short sequences."""
    return make_inputs(VARIANT, Problem(2, STEPS, initial_state=True), seed=3).to(device)


@pytest.fixture
def operator(modules) -> Operator:
    """Return a package's operator whose sums do not depend on the order of programs."""
    return modules("two_level_partial", "carry").m2rnn


def differentiate(operator: Operator, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return y, the final state and the gradients of all operands."""
    leaves = [inputs[name].detach().requires_grad_() for name in OPERANDS]
    y, state = operator(*leaves)
    gradients = torch.autograd.grad([y, state], leaves, [inputs["dy"], inputs["dstate"]])
    return [y.detach(), state.detach(), *gradients]


def _named(inputs: Inputs) -> dict[str, Tensor]:
    return {field.name: getattr(inputs, field.name) for field in fields(inputs)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_strides_give_the_same_bits(operator, inputs, layout) -> None:
    """All operands and incoming gradients at once in another memory layout change no bit of any result."""
    plain = _named(inputs)
    laid_out = {name: x if x is None else layout(x) for name, x in plain.items()}
    contiguous = [name for name in OPERANDS if laid_out[name].is_contiguous()]
    assert contiguous == (["q", "k"] if layout is _transposed else [])
    for given, expected in zip(differentiate(operator, laid_out), differentiate(operator, plain), strict=True):
        assert torch.equal(given, expected)


def test_expanded_operands_of_stride_zero(operator, inputs) -> None:
    """One step's operands expanded over all steps and sequences equal their copies."""
    plain = _named(inputs)
    for name in ("q", "k", "v", "forget", "dy"):
        plain[name] = plain[name][:1, :1].expand(2, STEPS, *plain[name].shape[2:])
    copied = {name: x if x is None else x.contiguous() for name, x in plain.items()}
    for given, expected in zip(differentiate(operator, plain), differentiate(operator, copied), strict=True):
        assert torch.equal(given, expected)


def _in_pieces(operator: Operator, pieces: tuple[int, ...]) -> Operator:
    """Return an operator that calls ``operator`` on one piece of the steps after the other."""

    def call(q, k, v, weight, forget, state):
        outputs = []
        for q_, k_, v_, f_ in zip(*(x.split(pieces, 1) for x in (q, k, v, forget)), strict=True):
            y, state = operator(q_, k_, v_, weight, f_, state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    return call


@pytest.mark.parametrize("clip", ["carry", "total"])
def test_pieces_equal_one_call(modules, inputs, clip) -> None:
    """A sequence handed over in pieces, state by state, gives the same results and gradients."""
    operator, plain = modules("two_level_partial", clip).m2rnn, _named(inputs)
    pieces = differentiate(_in_pieces(operator, (1, 0, STEPS - 1)), plain)
    for given, expected in zip(pieces, differentiate(operator, plain), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_equals_one_by_one(operator, inputs, dtype) -> None:
    """A packed batch of the two sequences gives what the padded batch gives, whatever the offsets' dtype."""
    y, state = operator(*(getattr(inputs, name) for name in OPERANDS))
    flat = {name: getattr(inputs, name) for name in OPERANDS}
    flat |= {name: flat[name].flatten(0, 1) for name in ("q", "k", "v", "forget")}
    offsets = torch.tensor([0, STEPS, 2 * STEPS], dtype=dtype, device=y.device)
    packed, packed_state = operator(*flat.values(), cu_seqlens=offsets)
    assert torch.equal(packed, y.flatten(0, 1))
    assert torch.equal(packed_state, state)


def test_no_sequences_at_all(operator, device) -> None:
    """A batch of 0 gives empty results, and gradients of zeros for the weight."""
    empty = make_inputs(VARIANT, Problem(0, 3, initial_state=True), seed=0).to(device)
    y, state, *gradients = differentiate(operator, _named(empty))
    assert y.shape == (0, 3, 2, 16)
    assert state.shape == (0, 2, 16, 16)
    assert [tuple(g.shape) for g in gradients] == [tuple(getattr(empty, name).shape) for name in OPERANDS]
    assert not gradients[OPERANDS.index("weight")].any()


SABOTAGE = {
    "gate_factor": ("d = (1.0 - f_0) * g", "d = g", {"dk", "dv", "dweight", "dforget", "dinitial_state"}),
    "tanh_derivative": ("(1.0 - z_1 * z_1)", "1.0", {"dk", "dv", "dweight", "dforget", "dinitial_state"}),
    "clamp": ("g = clamp(c, bound)", "g = c", {"dk", "dv", "dweight", "dforget", "dinitial_state"}),
    "own_state": ("dq_0 = tl.sum(h_1 *", "dq_0 = tl.sum(h_0 *", {"dq"}),
    "gradient_of_carry": ("f_0 * g)", "g)", {"dk", "dv", "dweight", "dforget", "dinitial_state"}),
    "store_of_dq": ("tl.store(dq +", None, {"dq"}),
    "store_of_state": ("tl.store(h_last +", None, {"state"}),
    "output": ("y_1 = tl.sum(q_1", "y_1 = tl.sum(q_0", {"y"}),
}
"""What is broken, by what text, and the results that it must push over budget."""


def _broken(source: str, old: str, new: str | None) -> str:
    """Replace a text that a kernel must hold, or the whole statement that it begins where ``new`` is None."""
    assert old in source, f"the templates no longer write {old!r}: update SABOTAGE"
    return source.replace(old, new) if new is not None else re.sub(rf"{re.escape(old)}.*", "pass", source)


def _sabotaged(name: str, folder: Path) -> Operator:
    """Return the operator of a package whose kernels were broken as SABOTAGE says."""
    old, new, _ = SABOTAGE[name]
    schedule = make_schedule("partial")
    package = build_package(f"sabotage_{name}", [make_variant(heads=(2, 2, 2, 2, 2))], schedule)
    path = next(path for path in package.files if "__f16" in path)
    files = {**package.files, path: _broken(package.files[path], old, new)}
    package = replace(package, files=files)
    return import_package(folder / name, package).m2rnn


@pytest.mark.parametrize("name", SABOTAGE)
def test_verification_catches_broken_kernels(name, tmp_path, device) -> None:
    """One wrong factor, operand or missing store puts exactly the results that depend on it over budget."""
    variant = make_variant(heads=(2, 2, 2, 2, 2))
    case = Case("test", Problem(1, 7, initial_state=True), dy_scale=3.0)
    report = run_case(_sabotaged(name, tmp_path), variant, case, 0, device)
    over = {result.tensor for result in report.results if not result.passed}
    assert over == SABOTAGE[name][2]
