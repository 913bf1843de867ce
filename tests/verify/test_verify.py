"""What verification finds: right results within budget, wrong ones over, and nothing lost when a case breaks off."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch
from reference_package import reference_package
from support import make_variant

from m2gen.problem import Draw, Gates, Problem, Weights, make_inputs
from m2gen.runtime.reference import forget_gate
from m2gen.verify import Case, Check, Feature, Layout, Loss, TensorResult, cases, differentiate, judge, oracle, run_case
from m2gen.verify.checks.drop_in import published
from m2gen.verify.checks.gradients import LAYOUTS
from m2gen.verify.oracle import TENSORS, eager, own_arithmetic, same
from m2gen.verify.run import one_line
from m2gen.verify.subject import CaseContext, inputs_of

CPU = torch.device("cpu")
RAGGED = Problem(2, 5, initial_state=True)
VARIANTS = {
    "fp32": make_variant(),
    "approx": make_variant(9, 9, (2, 1, 4, 4, 2), "bf16", tanh="approx"),
    "tf32": make_variant(dtype="fp32", products="tf32", clip="total"),
    "softplus": make_variant(9, 9, (1, 1, 4, 2, 4), "bf16", gate="softplus"),
}
WITHOUT_KERNELS = {
    Check.OPCHECK, Check.COMPILE, Check.ISOLATED, Check.LAYER, Check.LAYER_DECODING, Check.POOL, Check.POOL_PROMPTS,
    Check.POOL_KEPT, Check.LAYER_POOL,
}  # fmt: skip
"""Checks that the eager reference does not pass: it is no operator, unrolls its steps, sums by shape, has no layer and
no pools."""


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_reference_in_the_kernels_dtypes_passes_every_case(variant) -> None:
    """Each case of the interpreter accepts a package that rounds where kernels do."""
    package = reference_package(variant)
    found = [case for case in cases(variant, 4, interpreted=True) if case.check not in WITHOUT_KERNELS]
    reports = [run_case(package, variant, case, 0, CPU) for case in found if case.check is not Check.DROP_IN]
    assert [(r.case, r.failure, [x for x in r.results if not x.passed]) for r in reports if not r.passed] == []
    assert all(report.results for report in reports)


def test_a_raising_operator_is_a_failed_case() -> None:
    """What an operator raises ends up in its case's report, in one line."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of\n shared   memory")

    package = reference_package(VARIANTS["fp32"])
    package.m2rnn = fail
    report = run_case(package, VARIANTS["fp32"], Case("test", RAGGED, feature=Feature.DIMS), 3, CPU)
    assert (report.passed, report.results, report.failure) == (False, (), "RuntimeError: out of shared memory")
    assert (report.feature, report.case, report.seed, report.dtype) == (Feature.DIMS, "test", 3, "fp32")


def _off(factor: float):
    """Return a package whose y is wrong by a factor."""
    package = reference_package(VARIANTS["fp32"])
    right = package.m2rnn
    package.m2rnn = lambda *args, **facts: (lambda y, state: (y * factor, state))(*right(*args, **facts))
    return package


def test_a_small_factor_is_over_budget() -> None:
    """A y that is wrong by 1e-5, in float32, is over budget, and so are the gradients that come through it alone."""
    report = run_case(_off(1 + 1e-5), VARIANTS["fp32"], Case("test", RAGGED, loss=Loss.Y), 0, CPU)
    over = {result.tensor for result in report.results if not result.passed}
    assert {"y", "dq"} <= over
    assert "state" not in over
    assert not report.passed


def test_nan_another_shape_and_another_dtype_are_over_budget() -> None:
    """Whatever cannot be compared is wrong."""
    variant, case = VARIANTS["fp32"], Case("test", RAGGED)
    inputs = make_inputs(variant, RAGGED, 0)
    known = oracle(variant, case, inputs, 0)
    right = known.exact["y"].float()
    assert judge({"y": right}, known)[0].passed
    for wrong in (right * math.nan, right[:1], right.double()):
        assert not judge({"y": wrong}, known)[0].passed


@pytest.mark.parametrize(("error", "budget", "over", "passed"), [
    (1e-3, 1e-3, False, True),
    (2e-3, 1e-3, False, False),
    (math.nan, 1e-3, False, False),
    (0.0, 0.0, False, True),
    (1e-30, 0.0, False, False),
    (2e-3, 1e-3, True, True),
    (1e-3, 1e-3, True, False),
    (math.nan, 1e-3, True, False),
    (1e-3, math.inf, False, False),
    (math.inf, math.inf, False, False),
])  # fmt: skip
def test_what_passes(error, budget, over, passed) -> None:
    """A tensor passes at its budget and below; a control above it; what is not a number never."""
    assert TensorResult("y", error, budget, over).passed is passed


def test_a_reference_that_overflows_is_no_budget() -> None:
    """Where the kernel's own dtypes cannot hold what is asked, the case has failed, and says why."""
    result = TensorResult("dweight", 1e-3, math.inf)
    assert result.verdict == "must have a budget, got a reference that overflows in the kernel's dtypes"
    assert result.part == math.inf


@pytest.mark.parametrize("name", ["dy_large", "softplus_dy_large"])
@pytest.mark.parametrize("gate", ["given", "softplus"])
def test_large_gradients_fit_float16(name, gate) -> None:
    """A weight that 132 heads share has a gradient that float16 holds."""
    variant = make_variant(256, 16, (1, 1, 132, 132, 1), "fp16", gate=gate)
    found = [case for case in cases(variant, 16, interpreted=False) if case.name == name]
    for case in found:
        known = oracle(variant, case, inputs_of(variant, case, 0, CPU), 0)
        assert all(map(math.isfinite, known.budgets.values()))
    assert bool(found) == (name == "dy_large" or gate == "softplus")


def test_the_same_bits_are_asked_for_bit_by_bit() -> None:
    """The last bit of one element, and a NaN, are differences."""
    x = torch.ones(1000)
    y = x.clone()
    y[7] = torch.nextafter(y[7], torch.tensor(2.0))
    assert [r.passed for r in same({"a": x, "b": y, "c": x * math.nan}, {"a": x, "b": x, "c": x})] == [
        True,
        False,
        False,
    ]


def test_tf32_budgets_are_wider_and_the_state_needs_them() -> None:
    """The budget of tf32 products is theirs: about 2^-12 / 2^-24 times that of ieee, for the same inputs."""
    case = Case("test", RAGGED)
    narrow, wide = (
        oracle(variant, case, make_inputs(variant, RAGGED, 0), 0)
        for variant in (make_variant(), make_variant(products="tf32"))
    )
    for tensor in ("y", "state", "dweight", "dinitial_state"):
        assert 100 < wide.budgets[tensor] / narrow.budgets[tensor] < 10000


def test_a_computed_gate_has_its_parameters_judged() -> None:
    """A_log and dt_bias have exact gradients and budgets of float32, beside bf16 operands."""
    variant = VARIANTS["softplus"]
    known = oracle(variant, Case("test", RAGGED), make_inputs(variant, RAGGED, 0), 0)
    assert set(known.exact) == {*TENSORS, "dA_log", "ddt_bias"}
    assert known.dtypes["dA_log"] is torch.float32
    assert known.dtypes["dforget"] is torch.bfloat16
    assert all(known.exact[name].abs().sum() > 0 for name in ("dA_log", "ddt_bias"))


def test_losing_one_minus_f_is_over_budget() -> None:
    """With 1 - f about 1e-6, a kernel that forms it from a float32 f is far outside the budgets of the gate's case."""
    variant = make_variant(gate="softplus")
    case = next(c for c in cases(variant, 4, interpreted=True) if c.name == "softplus_vanishing")
    inputs = make_inputs(variant, case.problem, 0, case.draw)
    f, rest = forget_gate(inputs.forget.double(), inputs.A_log.double(), inputs.dt_bias.double())
    assert 1e-7 < rest.min() <= rest.max() < 1e-5
    known = oracle(variant, case, inputs, 0)
    lossy = replace(inputs, forget=f.float(), A_log=None, dt_bias=None)
    given = differentiate(eager(variant, own_arithmetic(variant)), lossy, case)
    over = {result.tensor for result in judge({n: given[n] for n in ("y", "state")}, known) if not result.passed}
    assert over == {"y", "state"}


@pytest.mark.parametrize("layout", Layout)
def test_layouts_keep_values_and_change_strides(layout) -> None:
    """Every layout but the plain one lies otherwise in memory and holds the same numbers."""
    x = torch.randn(2, 3, 4, 5)
    x = x[:1, :1].expand(2, 3, 4, 5).contiguous() if layout is Layout.EXPANDED else x
    laid_out = LAYOUTS[layout](x)
    assert torch.equal(laid_out, x)
    assert (laid_out.stride() == x.stride()) is (layout is Layout.PLAIN)


@pytest.mark.parametrize("problem", [RAGGED, Problem(0, 0, lengths=(3, 0, 4), initial_state=True)])
def test_the_published_equations_are_the_references(problem) -> None:
    """Two independent ways to the same gradients agree to float64's accuracy."""
    variant = make_variant(9, 9, (2, 1, 4, 4, 2))
    inputs = make_inputs(variant, problem, 0, Draw(dy_scale=3.0))
    exact = oracle(variant, Case("test", problem, dy_scale=3.0), inputs, 0).exact
    ours = published(inputs, 1.0)
    assert set(ours) == set(exact)
    for name, tensor in exact.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-10, atol=1e-12)


def test_questions_that_are_the_same_share_an_oracle() -> None:
    """Layout, feature and mode do not change what is right; expansion and sizes do."""
    case = Case("a", RAGGED)
    subject = CaseContext(reference_package(VARIANTS["fp32"]), VARIANTS["fp32"], case, 0, CPU)
    strided = replace(subject, case=replace(case, name="b", layout=Layout.STRIDED, deterministic=True))
    assert subject.known is strided.known
    assert replace(case, layout=Layout.EXPANDED).question != case.question
    assert replace(case, clip=None).question != case.question


@pytest.mark.parametrize("gates", [Gates.ZERO, Gates.ONE, Gates.SLOW])
def test_gates_at_the_ends(gates) -> None:
    """f is exactly 0, exactly 1, or in float32 just below 1."""
    forget = make_inputs(make_variant(dtype="bf16"), RAGGED, 0, Draw(gates=gates)).forget
    value = {Gates.ZERO: 0.0, Gates.ONE: 1.0, Gates.SLOW: 1 - 1e-4}[gates]
    torch.testing.assert_close(forget.float(), torch.full_like(forget, value).float(), rtol=0, atol=6e-8)
    assert forget.dtype is (torch.float32 if gates is Gates.SLOW else torch.bfloat16)


def test_weights_of_every_kind() -> None:
    """The identity, orthogonal matrices, and standard normal ones."""
    drawn = {kind: make_inputs(make_variant(), RAGGED, 0, Draw(weights=kind)).weight for kind in Weights}
    eye = torch.eye(16).expand(2, 16, 16)
    assert torch.equal(drawn[Weights.IDENTITY], eye)
    orthogonal = drawn[Weights.ORTHOGONAL]
    torch.testing.assert_close(orthogonal @ orthogonal.mT, eye, atol=1e-5, rtol=0)
    assert 0.9 < drawn[Weights.NORMAL].std() < 1.1
    assert 0 < (drawn[Weights.TRAINED] - eye).norm() < eye.norm()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_budget_has_one_rounding_of_the_result(dtype) -> None:
    """What the reference copies has no error, and a kernel may still round it once."""
    variant, problem = make_variant(dtype=dtype), Problem(1, 0, initial_state=True)
    known = oracle(variant, Case("test", problem), make_inputs(variant, problem, 0), 0)
    assert known.budgets["state"] == torch.finfo(torch.float32).eps / 2
    assert known.budgets["dq"] == torch.finfo(known.dtypes["dq"]).eps / 2


@pytest.mark.parametrize(("seq", "draws"), [(128, 8), (129, 4)])
def test_few_tokens_have_more_draws(seq, draws, monkeypatch) -> None:
    """A handful of numbers is as wrong as luck will have it: the budget of up to 128 tokens is from twice the draws."""
    variant, problem, seen = make_variant(9, 9), Problem(1, seq), []

    def drawn(variant, inputs, case, exact, seed, *, nominal):
        seen.append((seed, nominal))
        return dict.fromkeys(exact, float(seed))

    monkeypatch.setattr(sys.modules["m2gen.verify.oracle"], "_drawn_errors", drawn)
    known = oracle(variant, Case("test", problem), make_inputs(variant, problem, 0), 5)
    assert seen == [(5 + i, i == 0) for i in range(draws)]
    assert known.budgets["state"] == 2.0 * (5 + draws - 1) + torch.finfo(torch.float32).eps / 2


def test_messages_have_no_control_characters() -> None:
    """They are shown by terminals, and XML has no place for them."""
    assert one_line(ValueError("\x1b[31mred\x00\ud800")).isprintable()
