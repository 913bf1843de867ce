"""torch.func on the operator: gradients in every nesting, mapped dims, and tangents, which are refused."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import Spy, assert_same, operators_of
from layer import Mixer, make_layer, tokens
from support import OPERANDS, make_variant
from torch import Tensor
from torch.autograd import forward_ad

from m2gen.problem import Problem, make_inputs

Operands = tuple[Tensor, ...]
EVERY = tuple(range(len(OPERANDS)))
PER_SEQUENCE = (0, 0, 0, None, 0, 0)
"""The mapped dims of operands that all but the weight have."""
REFUSED = r"^m2rnn: forward-mode derivatives .* are not built; use reverse mode"


@pytest.fixture
def package(modules) -> ModuleType:
    """Return a package whose sums do not depend on the order of programs."""
    return modules("two_level_partial", "carry")


def draw(device: torch.device, seed: int = 0) -> Operands:
    """Return q, k, v, weight, forget and an initial state of one sequence."""
    inputs = make_inputs(make_variant(), Problem(1, 3, initial_state=True), seed=seed).to(device)
    return tuple(getattr(inputs, name) for name in OPERANDS)


@pytest.fixture
def operands(device: torch.device) -> Operands:
    """Return operands in the operator's order."""
    return draw(device)


def loss_of(package: ModuleType, **options: Any) -> Callable[..., Tensor]:
    """Return a loss on y and the final state."""

    def loss(*operands: Tensor) -> Tensor:
        y, state = package.m2rnn(*operands, **options)
        return y.square().sum() + state.sin().sum()

    return loss


def backwards(loss: Callable[..., Tensor], operands: Operands) -> Operands:
    """Return the gradients that autograd gives outside of torch.func."""
    leaves = [x.detach().clone().requires_grad_() for x in operands]
    return torch.autograd.grad(loss(*leaves), leaves)


def same(given: Any, expected: Any) -> None:
    """Fail unless two tuples of tensors have the same bits."""
    assert_same(dict(enumerate(given)), dict(enumerate(expected)))


GRADIENTS = {
    "grad": lambda loss, x: torch.func.grad(loss, argnums=EVERY)(*x),
    "grad_and_value": lambda loss, x: torch.func.grad_and_value(loss, argnums=EVERY)(*x)[0],
    "vjp": lambda loss, x: torch.func.vjp(loss, *x)[1](torch.ones((), device=x[0].device)),
    "jacrev": lambda loss, x: torch.func.jacrev(loss, argnums=EVERY)(*x),
    "grad without autograd": lambda loss, x: torch.no_grad()(torch.func.grad(loss, argnums=EVERY))(*x),
    "grad, compiled": lambda loss, x: torch.compile(
        torch.func.grad(loss, argnums=EVERY), backend="aot_eager", fullgraph=True
    )(*x),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_autograd(package, operands, name) -> None:
    """Each of torch.func's reverse-mode transforms gives the bits that ``backward`` does, for every operand."""
    loss = loss_of(package)
    same(GRADIENTS[name](loss, operands), backwards(loss, operands))


def test_a_jacobian_of_several_results(package, operands) -> None:
    """The rows of jacrev's result, which maps the backward over them, are gradients of single numbers."""
    jacobian = torch.func.jacrev(lambda q: package.m2rnn(q, *operands[1:])[0][0, -1, 0, :3])(operands[0])
    for i, row in enumerate(jacobian):
        leaf = operands[0].clone().requires_grad_()
        y, _ = package.m2rnn(leaf, *operands[1:])
        assert torch.equal(row, torch.autograd.grad(y[0, -1, 0, i], leaf)[0])


def test_gradients_of_a_module_called_with_other_parameters(package, device) -> None:
    """``functional_call`` under ``grad``, as research code has it, over a module around the operator."""
    torch.manual_seed(0)
    module, x = Mixer(package.m2rnn).to(device), torch.randn(1, 3, 8).to(device)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    given = torch.func.grad(lambda p: torch.func.functional_call(module, p, (x,)).square().sum())(parameters)
    module(x).square().sum().backward()
    assert_same(given, {name: p.grad for name, p in module.named_parameters() if p.grad is not None})


def slices(operands: Operands, dims: tuple[int | None, ...]) -> list[Operands]:
    """Return the arguments of each slice of a mapped dim."""
    size = next(x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None)
    pairs = list(zip(operands, dims, strict=True))
    return [tuple(x if dim is None else x.select(dim, i) for x, dim in pairs) for i in range(size)]


MAPPED = {
    "sequences": PER_SEQUENCE,
    "another dim": (1, 0, 2, None, 0, 3),
    "q alone": (0, None, None, None, None, None),
    "weights": (None, None, None, 0, None, None),
    "everything": (0,) * 6,
}


@pytest.fixture(params=MAPPED)
def mapped(request, device) -> tuple[Operands, tuple[int | None, ...]]:
    """Return operands, some with a dim of two to map over, and which dims those are."""
    dims = MAPPED[request.param]
    pairs = zip(draw(device, 0), draw(device, 1), dims, strict=True)
    return tuple(one if dim is None else torch.stack((one, other), dim) for one, other, dim in pairs), dims


def test_vmap(package, mapped) -> None:
    """Whatever is mapped, each place has the bits that it has alone."""
    operands, dims = mapped
    given = torch.vmap(package.m2rnn, in_dims=dims)(*operands)
    expected = [package.m2rnn(*part) for part in slices(operands, dims)]
    same(given, [torch.stack(x) for x in zip(*expected, strict=True)])


@pytest.mark.parametrize("name", MAPPED)
def test_nothing_is_mapped(package, device, name) -> None:
    """A mapped dim of no places gives results and gradients of no places."""
    dims = MAPPED[name]
    pairs = list(zip(draw(device, 0), dims, strict=True))
    operands = tuple(x if dim is None else torch.stack((x, x), dim).narrow(dim, 0, 0) for x, dim in pairs)
    alone = package.m2rnn(*(x for x, _ in pairs))
    given = torch.vmap(package.m2rnn, in_dims=dims)(*operands)
    assert [x.shape for x in given] == [(0, *x.shape) for x in alone]
    gradients = torch.vmap(torch.func.grad(loss_of(package), argnums=EVERY), in_dims=dims)(*operands)
    assert [x.shape for x in gradients] == [(0, *x.shape) for x, _ in pairs]


def test_gradients_of_each_sample(package, mapped) -> None:
    """vmap over grad: the shared weight has a gradient for each sample, too."""
    operands, dims = mapped
    loss = loss_of(package)
    given = torch.vmap(torch.func.grad(loss, argnums=EVERY), in_dims=dims)(*operands)
    expected = [backwards(loss, part) for part in slices(operands, dims)]
    same(given, [torch.stack(x) for x in zip(*expected, strict=True)])


def test_gradients_through_vmap(package, mapped) -> None:
    """grad over vmap, and autograd over vmap: whether states are saved is not known where the call is made."""
    operands, dims = mapped
    loss = loss_of(package)

    def total(*operands: Tensor) -> Tensor:
        return torch.vmap(loss, in_dims=dims)(*operands).sum()

    given = torch.func.grad(total, argnums=EVERY)(*operands)
    parts = [backwards(loss, part) for part in slices(operands, dims)]
    for gradient, samples, dim in zip(given, zip(*parts, strict=True), dims, strict=True):
        expected = sum(samples) if dim is None else torch.stack(samples, dim)
        torch.testing.assert_close(gradient, expected)
    same(backwards(total, operands), given)


def test_sequences_are_mapped_by_one_launch(package, device, monkeypatch) -> None:
    """A mapped dim of sequences is a part of B where nothing is differentiated."""
    operands = tuple(torch.stack((x, x)) if dim == 0 else x for x, dim in zip(draw(device), PER_SEQUENCE, strict=True))
    spy = Spy(package, monkeypatch)
    torch.vmap(package.m2rnn, in_dims=PER_SEQUENCE)(*operands)
    assert spy.launched == ["forward"]


def test_packed_sequences_are_mapped(package, device) -> None:
    """Mapped features of one packed batch have their offsets in common."""
    q, k, v, weight, forget, _ = draw(device)
    offsets = torch.tensor([0, 1, 3], device=device)
    packed = [x[0] for x in (q, k, v)]

    def call(scale: Tensor) -> Tensor:
        y, _ = package.m2rnn(packed[0] * scale, *packed[1:], weight, forget[0], cu_seqlens=offsets)
        assert isinstance(y, Tensor)
        return y

    scales = torch.tensor([1.0, -0.5], device=device)
    assert torch.equal(torch.vmap(call)(scales), torch.stack([call(scale) for scale in scales]))


TWICE = {
    "grad of grad": lambda f, x: torch.func.grad(lambda q: torch.func.grad(f)(q).sum())(x),
    "jacrev of grad": lambda f, x: torch.func.jacrev(torch.func.grad(f))(x),
    "grad of vjp": lambda f, x: torch.func.grad(lambda q: torch.func.vjp(f, q)[1](f(q))[0].sum())(x),
}


@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives_are_refused(package, operands, name) -> None:
    """Reverse over reverse raises at whatever level."""
    with pytest.raises(RuntimeError, match=r"^m2rnn: gradients cannot be differentiated again"):
        TWICE[name](lambda q: loss_of(package)(q, *operands[1:]), operands[0])


FORWARD_MODE = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "reverse over forward": lambda f, x: torch.func.jacrev(torch.func.jacfwd(f))(x),
    "forward of vmap": lambda f, x: torch.func.jvp(torch.vmap(f), (x[None],), (x[None],)),
    "forward of a vjp": lambda f, x: torch.func.jvp(lambda q: torch.func.vjp(f, q)[1](f(q)), (x,), (x,)),
    "autograd.functional": lambda f, x: torch.autograd.functional.jacobian(
        f, x, strategy="forward-mode", vectorize=True
    ),
    "compiled": lambda f, x: torch.func.jvp(torch.compile(f, backend="aot_eager"), (x,), (x,)),
}


@pytest.mark.parametrize("of", OPERANDS)
def test_tangents_are_refused_whichever_operand_has_one(package, operands, monkeypatch, of) -> None:
    """Dual tensors raise one error before anything runs, rather than losing their tangents."""
    spy, place = Spy(package, monkeypatch), OPERANDS.index(of)
    with forward_ad.dual_level():
        given = list(operands)
        given[place] = forward_ad.make_dual(given[place], given[place])
        with pytest.raises(NotImplementedError, match=REFUSED):
            package.m2rnn(*given)
        with torch.no_grad(), pytest.raises(NotImplementedError, match=REFUSED):
            package.m2rnn(*given)
        wanting = [x if i == place else x.clone().requires_grad_() for i, x in enumerate(given)]
        with pytest.raises(NotImplementedError, match=REFUSED):
            package.m2rnn(*wanting)
    assert spy.launched == []


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_is_refused(package, operands, name) -> None:
    """Every transform that needs tangents raises the same error, which names what to use."""
    with pytest.raises(Exception, match="m2rnn: forward-mode derivatives"):
        FORWARD_MODE[name](lambda q: loss_of(package)(q, *operands[1:]), operands[0])


def test_a_tangent_of_dy_is_refused(package, operands) -> None:
    """The backward has tangents, too, where its own input has one."""
    y, _ = package.m2rnn(operands[0].clone().requires_grad_(), *operands[1:])
    _, vjp = torch.func.vjp(lambda q: package.m2rnn(q, *operands[1:])[0], operands[0])
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(NotImplementedError, match=REFUSED):
            y.backward(dy)
        with pytest.raises(NotImplementedError, match=REFUSED):
            vjp(dy)


def test_calls_without_tangents_beside_some(package, operands) -> None:
    """Where dual tensors are about, calls that have none work, as does inference mode, which drops all."""
    expected = package.m2rnn(*operands)
    gradients = backwards(loss_of(package), operands)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(operands[0], operands[0])
        same(package.m2rnn(*operands), expected)
        same(backwards(loss_of(package), operands), gradients)
        with torch.inference_mode():
            same(package.m2rnn(dual, *operands[1:]), expected)


def test_the_reference_has_tangents(package, operands) -> None:
    """With ``backend="reference"`` forward mode works, and agrees with differences of float64 results."""
    operands = tuple(x.double() for x in operands)
    direction = tuple(torch.randn_like(x) for x in operands)
    loss = loss_of(package, backend="reference", clip=None)
    _, tangent = torch.func.jvp(loss, operands, direction)
    step = 1e-6
    ahead, behind = (loss(*(x + sign * step * d for x, d in zip(operands, direction, strict=True))) for sign in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)
    bounded = loss_of(package, backend="reference", clip=1e-3)  # which bounds gradients alone
    assert torch.equal(torch.func.jvp(bounded, operands, direction)[1], tangent)


def test_the_reference_has_second_derivatives(package, operands) -> None:
    """Forward over reverse and reverse over reverse agree."""
    operands = tuple(x.double()[:, :2] if i in (0, 1, 2, 4) else x.double() for i, x in enumerate(operands))

    def loss(q: Tensor) -> Tensor:
        return loss_of(package, backend="reference", clip=None)(q, *operands[1:])

    forward = torch.func.hessian(loss)(operands[0])
    assert forward.abs().max() > 0.1
    torch.testing.assert_close(forward, torch.func.jacrev(torch.func.grad(loss))(operands[0]))


def test_the_reference_under_vmap_and_grad(package, mapped) -> None:
    """Its own functions have rules for torch.func, with the bound in place."""
    operands, dims = mapped
    loss = loss_of(package, backend="reference", clip=0.5)
    given = torch.vmap(torch.func.grad(loss, argnums=EVERY), in_dims=dims)(*operands)
    parts = [backwards(loss, part) for part in slices(operands, dims)]
    expected = [torch.stack(x) for x in zip(*parts, strict=True)]
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture
def token(operands) -> dict[str, Tensor]:
    """Return the operands of one step, without a state."""
    q, k, v, weight, forget, _ = operands
    return {"k": k[:, 0], "v": v[:, 0], "weight": weight, "forget": forget[:, 0]} | {"q": q[:, 0]}


def stepping(package: ModuleType, token: dict[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a step as a function of q and the state."""

    def step(q: Tensor, state: Tensor) -> Tensor:
        y, _ = package.m2rnn_step(**{**token, "q": q}, state=state)
        assert isinstance(y, Tensor)
        return y

    return step


@pytest.mark.parametrize("of", ["q", "state"])
def test_steps_refuse_tangents(package, operands, token, monkeypatch, of) -> None:
    """A step raises for a tangent, of an operand or of the state, and leaves the state alone."""
    step, state = stepping(package, token), operands[5].clone()
    spy = Spy(package, monkeypatch)
    x = {"q": token["q"], "state": state}
    with pytest.raises(NotImplementedError, match=r"^m2rnn_step: forward-mode derivatives"):
        torch.func.jvp(lambda dual: step(**{**x, of: dual}), (x[of],), (x[of],))
    assert spy.launched == []
    assert torch.equal(state, operands[5])


def test_steps_refuse_gradients_at_any_level(package, operands, token) -> None:
    """A step under grad raises, also where vmap is between."""
    step = stepping(package, token)
    with pytest.raises(RuntimeError, match=r"^m2rnn_step: q must not require a gradient"):
        torch.func.grad(lambda q: step(q, operands[5].clone()).sum())(token["q"])
    states = operands[5].repeat(2, 1, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"^m2rnn_step: operands must not require a gradient"):
        torch.func.grad(lambda q: torch.vmap(step)(q, states.clone()).sum())(token["q"].repeat(2, 1, 1, 1))


def test_steps_are_mapped_in_place(package, operands, token) -> None:
    """Each place advances its own state; a state that is not mapped would be written by all, which raises."""
    step = stepping(package, token)
    q, states = torch.stack((token["q"], -token["q"])), torch.stack((operands[5], -operands[5]))
    given, expected = states.clone(), states.clone()
    y = torch.vmap(step)(q, given)
    assert torch.equal(y, torch.stack([step(q[i], expected[i]) for i in range(2)]))
    assert torch.equal(given, expected)
    with pytest.raises(RuntimeError, match=r"^m2rnn_step: state must be mapped by vmap"):
        torch.vmap(lambda q: step(q, operands[5]))(q)


def test_the_registered_operators_alone(package, operands) -> None:
    """Transforms of the registered operators agree with those of ``m2rnn``."""
    q, k, v, weight, forget, state = operands

    def forward(q: Tensor) -> Tensor:
        operands = (q, k, v, weight, forget, None, None, state)
        y, _, _ = operators_of(package).FORWARD(*operands, None, None, 1.0, False, False)
        assert isinstance(y, Tensor)
        return y.square().sum()

    leaf = q.clone().requires_grad_()
    expected = torch.autograd.grad(forward(leaf), leaf)[0]
    assert torch.equal(torch.func.grad(forward)(q), expected)
    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.func.jvp(forward, (q,), (q,))


def test_states_of_any_strides_for_the_registered_operators(package, operands) -> None:
    """A compiler may hand over what its graph laid out otherwise: the operators take nothing for granted."""
    q, k, v, weight, forget, state = operands
    rest = (None, None, 1.0, True, False)
    expected = operators_of(package).FORWARD(q, k, v, weight, forget, None, None, state, *rest)
    other = state.transpose(2, 3).contiguous().transpose(2, 3)
    assert not other.is_contiguous()
    given = operators_of(package).FORWARD(q, k, v, weight, forget, None, None, other, *rest)
    same(given, expected)
    ends = {"dstate": state, "checkpoints": expected[2]}
    for name, x in ends.items():
        results = [
            operators_of(package).BACKWARD(
                expected[0], at["dstate"], q, k, v, weight, forget, None, None, at["checkpoints"], None, 1.0,
                [True] * 5 + [False, False, True], False,
            )
            for at in (ends, {**ends, name: x.transpose(2, 3).contiguous().transpose(2, 3)})
        ]  # fmt: skip
        same(*results)


def test_the_generated_layer(package, device) -> None:
    """``grad`` of a functional call is autograd's, and forward mode raises there, too."""
    layer, x = make_layer(package).to(device), tokens(device, 1, 3)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    given = torch.func.grad(loss)(parameters, x)
    layer(x).square().sum().backward()
    expected = {name: p.grad for name, p in layer.named_parameters()}
    torch.testing.assert_close(given, expected)  # torch sums some of its own products in another order
    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.func.jvp(layer, (x,), (x,))
    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.func.jvp(lambda p: loss(p, x), (parameters,), (parameters,))


def test_a_backward_that_is_compiled(package, operands) -> None:
    """Compiled autograd takes the recorded call for what it is."""
    loss = loss_of(package)
    expected = backwards(loss, operands)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        same(backwards_of_leaves(loss, operands), expected)


def backwards_of_leaves(loss: Callable[..., Tensor], operands: Operands) -> Operands:
    """Return the gradients that ``backward`` leaves at the operands."""
    leaves = [x.detach().clone().requires_grad_() for x in operands]
    loss(*leaves).backward()
    return tuple(x.grad for x in leaves if x.grad is not None)
