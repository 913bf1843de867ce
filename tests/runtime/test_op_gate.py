"""The gate computed in the kernel: f = exp(-exp(A_log) softplus(x + dt_bias)), exact where f is near 1."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from calls import (
    DIFFERENTIABLE,
    GATE,
    Results,
    alone,
    arguments,
    assert_same,
    differentiate,
    distance,
    of_sequence,
    packed,
)
from support import GATED_HEADS, make_variant
from torch import Tensor

from m2gen.problem import Inputs, Problem, make_inputs
from m2gen.runtime import reference

VARIANT = make_variant(heads=GATED_HEADS, gate="softplus")
EPS = torch.finfo(torch.float32).eps
# float32 throughout: a gradient is a sum of a few hundred products, each of a few roundings.
ROUNDINGS = 64 * EPS


@pytest.fixture
def package(modules) -> ModuleType:
    """Return an imported package."""
    return modules("one_step_partial", "carry")


def draw(device: torch.device, steps: int, dtype: str = "fp32", batch: int = 1, initial_state: bool = True) -> Inputs:
    """Return the operands of a call whose gate the kernel computes."""
    variant = make_variant(heads=GATED_HEADS, dtype=dtype, gate="softplus")
    return make_inputs(variant, Problem(batch, steps, initial_state=initial_state), seed=11).to(device)


def with_gate(inputs: Inputs, x: float, rate: float, dt_bias: float = 0.0) -> Inputs:
    """Return the inputs with every gate's input near x, exp(A_log) near ``rate``, and this dt_bias."""
    shift = torch.linspace(0, 1, inputs.forget.numel(), device=inputs.forget.device).reshape(inputs.forget.shape)
    log = torch.full_like(inputs.A_log, rate).log()
    return replace(inputs, forget=x + shift, A_log=log, dt_bias=torch.full_like(inputs.dt_bias, dt_bias))


def exact(inputs: Inputs, clip: float | None = 1.0) -> Results:
    """Return results and gradients in float64 by autograd, the gate written here as the paper states it."""

    def operator(q, k, v, weight, forget, initial_state=None, *, A_log, dt_bias):
        f = torch.exp(-torch.exp(A_log) * torch.log1p(torch.exp(forget + dt_bias)))
        return reference.m2rnn(q, k, v, weight, f, initial_state, clip=clip)

    wide = {name: x.double() for name in DIFFERENTIABLE if (x := getattr(inputs, name)) is not None}
    return differentiate(operator, replace(inputs, **wide))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_every_gradient_against_float64(package, device, clip) -> None:
    """Results and gradients of x, A_log and dt_bias, shared by the heads of a group, agree with plain autograd."""
    inputs = draw(device, 4, batch=2)
    given, expected = differentiate(package.m2rnn, inputs, clip=clip), exact(inputs, clip)
    assert given.keys() == expected.keys()
    assert {name: e for name in given if (e := distance(given[name], expected[name])) > ROUNDINGS} == {}
    for name in DIFFERENTIABLE:
        assert given[f"d{name}"].dtype == getattr(inputs, name).dtype


@pytest.mark.parametrize("x", [-14.0, -16.0, -20.0])
def test_gates_next_to_one_keep_what_they_write(package, device, x) -> None:
    """Where 1 - f is 1e-6 to 1e-9, what the head writes, and every gradient, is right to float32's rounding.

    From a state of zeros y is (1 - f) tanh(k v^T) q; 1 - f from a rounded f would be wrong in its first digits.
    """
    inputs = with_gate(draw(device, 2, initial_state=False), x, rate=1.0)
    f = torch.exp(-torch.nn.functional.softplus(inputs.forget))
    true = -torch.expm1(-torch.nn.functional.softplus(inputs.forget.double()))
    assert distance(1 - f, true) > 1e-3  # what a kernel that rounds f first could do at best
    given, expected = differentiate(package.m2rnn, inputs, clip=None), exact(inputs, clip=None)
    assert given.keys() == expected.keys()
    assert {name: e for name in given if (e := distance(given[name], expected[name])) > ROUNDINGS} == {}


@pytest.mark.parametrize("decay", [0.1, 0.3, 0.34, 0.36, 0.4, 1.0, 5.0])
def test_no_seam_between_the_ways_to_compute_the_gate(package, device, decay) -> None:
    """A first state, (1 - f) tanh(k v^T), is right to a few roundings, for f from near 1 to near 0."""
    inputs = with_gate(draw(device, 1, initial_state=False), 0.0, rate=decay / 0.8)
    _, state = package.m2rnn(**arguments(inputs))
    assert distance(state, exact(inputs)["state"]) < 8 * EPS


@pytest.mark.parametrize(("x", "rate"), [(50.0, 16.0), (1e4, 16.0), (80.0, 1e4), (1e30, 1.0)])
def test_gates_that_underflow_forget_everything(package, device, x, rate) -> None:
    """f of exactly 0 leaves the candidate, and no gradient for what made it 0: no NaN out of 0 times infinity."""
    inputs = with_gate(draw(device, 2), x, rate)
    given = differentiate(package.m2rnn, inputs)
    zero = replace(inputs, forget=torch.zeros_like(inputs.forget), A_log=None, dt_bias=None)
    y, state = reference.m2rnn(**arguments(zero))
    assert distance(given["y"], y) < ROUNDINGS
    assert distance(given["state"], state) < ROUNDINGS
    for name in ("forget", *GATE):
        assert not given[f"d{name}"].any()
    assert all(x.isfinite().all() for x in given.values())


@pytest.mark.parametrize("x", [-120.0, -1e4, -1e30])
def test_gates_of_exactly_one_keep_everything(package, device, x) -> None:
    """Where softplus underflows, the state passes unchanged, and every gradient is finite."""
    inputs = with_gate(draw(device, 2), x, rate=1.0)
    given = differentiate(package.m2rnn, inputs)
    assert torch.equal(given["state"], inputs.initial_state)
    assert all(x.isfinite().all() for x in given.values())
    for name in ("k", "v", "weight"):
        assert not given[f"d{name}"].any()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_float32_input_beside_narrow_operands(package, device, dtype) -> None:
    """x may be float32 beside narrow q, k and v, and then is not rounded."""
    inputs = draw(device, 2, dtype)
    wide = replace(inputs, forget=inputs.forget.float() * (1 + 2.0**-12))
    given, rounded = differentiate(package.m2rnn, wide), differentiate(package.m2rnn, inputs)
    assert given["dforget"].dtype == torch.float32
    assert given["dA_log"].dtype == given["ddt_bias"].dtype == torch.float32
    assert distance(given["state"], rounded["state"]) > EPS
    assert distance(given["state"], exact(wide)["state"]) < 4 * torch.finfo(inputs.q.dtype).eps


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_narrow_parameters(package, device, dtype) -> None:
    """A_log and dt_bias in the dtype of q give what they give as float32, and gradients in that dtype."""
    inputs = draw(device, 2, dtype)
    narrow = replace(inputs, A_log=inputs.A_log.to(inputs.q.dtype), dt_bias=inputs.dt_bias.to(inputs.q.dtype))
    wide = replace(narrow, A_log=narrow.A_log.float(), dt_bias=narrow.dt_bias.float())
    given, expected = differentiate(package.m2rnn, narrow), differentiate(package.m2rnn, wide)
    for name in GATE:
        assert given[f"d{name}"].dtype == inputs.q.dtype
        expected[f"d{name}"] = expected[f"d{name}"].to(inputs.q.dtype)
    assert_same(given, expected)


def test_packed_with_a_computed_gate(package, device) -> None:
    """Packed sequences give the bits of each alone, and the parameters' gradients are the sums."""
    inputs = packed(draw(device, 2, batch=2))
    together = differentiate(package.m2rnn, inputs)
    each = [differentiate(package.m2rnn, alone(inputs, i)) for i in range(2)]
    for i, one in enumerate(each):
        part = of_sequence(together, inputs, i)
        assert_same(part, {name: one[name] for name in part})
    for name in GATE:
        total: Tensor = sum(one[f"d{name}"].double() for one in each)  # type: ignore[assignment]
        assert distance(together[f"d{name}"], total) < 4 * EPS


def test_the_given_gate_is_another_variant(package, device) -> None:
    """A package may lack the computed gate for dims that it has the given gate for, and the error says so."""
    inputs = make_inputs(make_variant(9, 9), Problem(1, 1), seed=0).to(device)
    parameters = {name: torch.zeros(2, device=device) for name in GATE}
    with pytest.raises(package.VariantNotBuiltError, match=r"gate softplus; built: .*gate: softplus"):
        package.m2rnn(**arguments(inputs), **parameters)
