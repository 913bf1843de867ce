"""The dtypes of operands and results, under autocast as well, and the kind of fp32 products."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from calls import DIFFERENTIABLE, arguments, assert_same, changed, differentiate, distance
from support import DTYPES, GATED_HEADS, OPERANDS, build_package, import_package, make_schedule, make_variant

from m2gen.problem import TORCH_DTYPE, Problem, make_inputs
from m2gen.verify import Case, run_case

NARROW = (torch.bfloat16, torch.float16)
PROBLEM = Problem(1, 2, initial_state=True)


@pytest.fixture(scope="module")
def package(modules) -> ModuleType:
    """Return a package whose sums do not depend on the order of programs."""
    return modules("two_level_partial", "carry")


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_and_gradients_have_the_promised_dtypes(package, device, dtype) -> None:
    """y comes in q's dtype, the state in float32, every gradient in its operand's dtype and shape."""
    inputs = make_inputs(make_variant(dtype=dtype), PROBLEM, seed=0).to(device)
    results = differentiate(package.m2rnn, inputs)
    assert (results["y"].dtype, results["y"].shape) == (TORCH_DTYPE[dtype], (1, 2, 2, 16))
    assert (results["state"].dtype, results["state"].shape) == (torch.float32, (1, 2, 16, 16))
    for name in OPERANDS:
        x = getattr(inputs, name)
        assert (results[f"d{name}"].dtype, results[f"d{name}"].shape) == (x.dtype, x.shape)


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_states_come_in(package, device, dtype) -> None:
    """An initial state in a narrow dtype is what it is as float32; its gradient comes back in that dtype."""
    inputs = make_inputs(make_variant(), PROBLEM, seed=0).to(device)
    narrow = changed(inputs, ("initial_state",), lambda x: x.to(dtype))
    wide = changed(narrow, ("initial_state",), lambda x: x.float())
    given, expected = differentiate(package.m2rnn, narrow), differentiate(package.m2rnn, wide)
    assert given["dinitial_state"].dtype == dtype
    assert_same(given, expected | {"dinitial_state": expected["dinitial_state"].to(dtype)})


@pytest.mark.parametrize("names", [("weight",), ("forget",), ("weight", "forget")], ids=" ".join)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_float32_beside_narrow_gets_float32_gradients(package, device, dtype, names) -> None:
    """The weight and the gate in float32 beside narrow q, k and v have gradients that are not rounded to those."""
    inputs = make_inputs(make_variant(dtype=dtype), PROBLEM, seed=0).to(device)
    wide = changed(inputs, names, lambda x: x.float())
    given, expected = differentiate(package.m2rnn, wide), differentiate(package.m2rnn, inputs)
    for name in names:
        gradient = given[f"d{name}"]
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.to(inputs.q.dtype).float())
        assert distance(expected[f"d{name}"], gradient) < torch.finfo(inputs.q.dtype).eps  # the interpreter truncates
    others = [name for name in expected if name[1:] not in names]
    assert_same({name: given[name] for name in others}, {name: expected[name] for name in others})


@pytest.mark.parametrize("gate", ["given", "softplus"])
@pytest.mark.parametrize("dtype", NARROW)
def test_autocast_casts_what_may_be_narrow(package, device, dtype, gate) -> None:
    """Under autocast float32 q, k and v are cast, a float32 weight and gate are not, and gradients are float32."""
    heads = GATED_HEADS if gate == "softplus" else (1, 1, 2, 2, 2)
    inputs = make_inputs(make_variant(heads=heads, gate=gate), PROBLEM, seed=0).to(device)

    def autocast(*operands, **named):
        with torch.autocast(device.type, dtype):
            return package.m2rnn(*operands, **named)

    given = differentiate(autocast, inputs)
    expected = differentiate(package.m2rnn, changed(inputs, ("q", "k", "v"), lambda x: x.to(dtype)))
    assert given["y"].dtype == dtype
    for name in ("dq", "dk", "dv"):
        expected[name] = expected[name].float()
    assert_same(given, expected)
    names = [name for name in DIFFERENTIABLE if getattr(inputs, name) is not None]
    assert all(given[f"d{name}"].dtype == torch.float32 for name in names)


def test_autocast_casts_a_narrow_weight_and_gate_to_its_dtype(package, device) -> None:
    """Operands that are not float32 are cast, so several narrow dtypes work together."""
    inputs = make_inputs(make_variant(), PROBLEM, seed=0).to(device)
    mixed = replace(inputs, k=inputs.k.half(), weight=inputs.weight.half(), forget=inputs.forget.half())
    with torch.autocast(device.type, torch.bfloat16):
        y, state = package.m2rnn(**arguments(mixed))
    every = changed(mixed, ("q", "k", "v", "weight", "forget"), lambda x: x.bfloat16())
    expected_y, expected = package.m2rnn(**arguments(every))
    assert torch.equal(y, expected_y)
    assert torch.equal(state, expected)


def test_autocast_off_inside_autocast(package, device) -> None:
    """A call where autocast is disabled again runs in float32."""
    inputs = make_inputs(make_variant(), PROBLEM, seed=0).to(device)
    with torch.autocast(device.type, torch.bfloat16), torch.autocast(device.type, enabled=False):
        assert package.m2rnn(**arguments(inputs))[0].dtype == torch.float32


def test_the_reference_rounds_no_products_under_autocast(package, device) -> None:
    """Under autocast the reference backend computes what it does of operands in autocast's dtype."""
    inputs = make_inputs(make_variant(dtype="bf16"), PROBLEM, seed=0).to(device)
    expected = differentiate(package.m2rnn, inputs, backend="reference")

    def autocast(**named):
        with torch.autocast(device.type, torch.bfloat16):
            return package.m2rnn(**named, backend="reference")

    assert_same(differentiate(autocast, inputs), expected)


def test_a_step_under_autocast(package, device) -> None:
    """Decoding under autocast is decoding in autocast's dtype."""
    inputs = make_inputs(make_variant(), Problem(2, 1, initial_state=True), seed=0).to(device)
    token = {name: getattr(inputs, name)[:, 0] for name in ("q", "k", "v", "forget")}
    with torch.autocast(device.type, torch.bfloat16):
        y, state = package.m2rnn_step(**token, weight=inputs.weight, state=inputs.initial_state.clone())
    narrow = {name: x if name == "forget" else x.bfloat16() for name, x in token.items()}
    expected_y, expected = package.m2rnn_step(**narrow, weight=inputs.weight, state=inputs.initial_state.clone())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected_y)
    assert torch.equal(state, expected)


def test_float32_products_are_ieee_unless_the_spec_asks_for_tf32(device, tmp_path) -> None:
    """Both kinds are within the budget of their own arithmetic, and kernels hold only the one that was asked for."""
    case = Case("test", Problem(1, 4, initial_state=True))
    for products, other in (("ieee", "tf32"), ("tf32", "ieee")):
        variant = make_variant(products=products)
        rendered = build_package(f"products_{products}", [variant], make_schedule("partial"))
        sources = [text for path, text in rendered.files.items() if "__f16" in path]
        assert all(f'input_precision="{products}"' in text and f'"{other}"' not in text for text in sources)
        module = import_package(tmp_path / products, rendered, f"m2gen_test_products_{products}")
        report = run_case(module, variant, case, 0, device)
        assert report.passed, report


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000], ids=["gpu", "negative", "quiet"])
def test_no_nan_becomes_a_number_in_tf32(device, tmp_path, bits) -> None:
    """A NaN reaches what its products make, whatever its bits: those of a GPU's NaN are all set but the sign."""
    built = build_package("nan_tf32", [make_variant(heads=(1,) * 5, products="tf32")], make_schedule("partial"))
    package = import_package(tmp_path / "nan", built, f"m2gen_test_nan_tf32_{bits}")
    inputs = make_inputs(make_variant(heads=(1,) * 5), Problem(1, 2, initial_state=True), seed=0).to(device)
    operands = {name: getattr(inputs, name) for name in ("q", "k", "v", "weight", "forget")}

    def spoiled(x: torch.Tensor) -> torch.Tensor:
        found = x.clone()
        found.view(torch.int32).flatten()[0] = bits
        return found

    wrong, first = {**operands, "weight": spoiled(operands["weight"])}, inputs.initial_state
    y, _ = package.m2rnn(**wrong, initial_state=first)
    assert y[..., 0].isnan().all()
    tokens, _ = package.m2rnn_steps(**wrong, pool=first.clone(), indices=torch.zeros(1, dtype=torch.int64).to(device))
    assert tokens[..., 0].isnan().all()
    weight = operands["weight"].requires_grad_()
    _, last = package.m2rnn(**{**operands, "weight": weight})
    last.backward(spoiled(inputs.dstate))
    assert weight.grad.isnan().any()
