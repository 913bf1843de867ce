"""The whole layer of a package, with its projections and states, against the same layer in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m2gen.problem import TORCH_DTYPE, Problem
from m2gen.verify.case import LayerForm, TensorResult
from m2gen.verify.oracle import DRAWS, FACTOR, Operator, Oracle, eager, judge, own_arithmetic, relative_error
from m2gen.verify.subject import CaseContext, poisoned

HIDDEN = 48
OPTIONS: dict[LayerForm, dict[str, Any]] = {
    LayerForm.PUBLISHED: {},
    LayerForm.BIASED: {"bias": True},
    LayerForm.TWO_WIDE: {"conv_width": 2},
    LayerForm.THREE_WIDE: {"conv_width": 3, "bias": True},
    LayerForm.NO_CONVOLUTION: {"conv_width": None},
    LayerForm.BARE: {"norm": None, "residual": False, "activation": None},
}
"""What the constructor gets for each form."""


class LayerCall(NamedTuple):
    """A call of a layer: inputs, states before it (None for zeros), offsets or a mask, and a seed of the loss."""

    x: Tensor
    states: tuple[Tensor, Tensor] | None
    offsets: Tensor | None
    mask: Tensor | None
    seed: int


def layer(subject: CaseContext) -> Iterable[TensorResult]:
    """Judge every result and gradient of a call of a layer, and of the same as usual.

    ``poisoned`` asks torch for determinism, so that kernels may sum by atomics in the second call alone.
    """
    module, call = drawn(subject)
    answer = known(subject, module, call)
    with poisoned():
        yield from judge(results(module, call), answer)
    yield from (replace(x, tensor=f"{x.tensor}_as_usual") for x in judge(results(module, call), answer))


def layer_decoding(subject: CaseContext) -> Iterable[TensorResult]:
    """Judge a prompt in two pieces and tokens one by one after it, and the cache in the end."""
    module, call = drawn(subject)
    return judge(decoded(module, call), known(subject, module, call, decoded))


def drawn(subject: CaseContext) -> tuple[nn.Module, LayerCall]:
    """Return a layer of the variant none of whose parameters is a 0 or a 1, and a call of it."""
    variant, problem = subject.variant, subject.case.problem
    heads = dict(zip("qkvfw", variant.heads.counts, strict=True))
    form = OPTIONS[subject.case.layer]
    made = subject.submodule("layer").M2RNN(
        HIDDEN, variant.state_expansion, variant.head_dim, heads, dtype=TORCH_DTYPE[variant.dtype], **form
    )
    generator = torch.Generator().manual_seed(subject.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, parameter in made.named_parameters():
            near = 0.5 * normal(*parameter.shape) / max(parameter.shape[-1], 1) ** 0.5
            base = 1.0 if name in ("D", "g_norm.weight") else 0.0
            if name == "state_weight":  # whose eigenvalues are within 1: a head that expands what is rounded is chaotic
                near = 0.5 * near + 0.7 * torch.eye(variant.head_dim)
            parameter.copy_(base + near)
    made.to(subject.device)
    lead = (sum(problem.lengths),) if problem.lengths is not None else (problem.batch, problem.seq)
    x = normal(*lead, HIDDEN).to(subject.device, TORCH_DTYPE[variant.dtype])
    return made, replace_call(subject, made, LayerCall(x, None, None, None, subject.seed), normal, problem)


def replace_call(
    subject: CaseContext, made: nn.Module, call: LayerCall, normal: Callable[..., Tensor], problem: Problem
) -> LayerCall:
    """Return the call with the states, offsets and mask that the problem asks for."""
    device, states, offsets, mask = subject.device, None, None, None
    if problem.lengths is not None:
        ends = torch.tensor((0, *problem.lengths)).cumsum(0)
        offsets = ends.to(device, torch.int32)
    batch = problem.batch if problem.lengths is None else len(problem.lengths)
    if problem.initial_state:
        cache: Any = made.allocate_cache(batch, device)  # type: ignore[operator]
        states = tuple(normal(*x.shape).to(device, x.dtype) for x in (cache.conv, cache.state))
    if subject.case.padded:
        mask = torch.ones(batch, problem.seq, dtype=torch.bool, device=device)
        mask[0, : problem.seq // 2] = False
    return call._replace(states=states, offsets=offsets, mask=mask)  # type: ignore[arg-type]


def results(made: nn.Module, call: LayerCall) -> dict[str, Tensor]:
    """Return y, the states after it, and every gradient of an uneven loss of all of them."""
    leaf = call.x.detach().clone().requires_grad_()
    states = tuple(x.detach().clone().requires_grad_() for x in call.states or ())
    if call.mask is not None:
        found = {"y": made(leaf, attention_mask=call.mask)}
    else:
        scanned = made.scan(leaf, *(states or (None, None)), call.offsets)  # type: ignore[operator]
        found = dict(zip(("y", "conv", "state"), scanned, strict=True))
    found = {name: x for name, x in found.items() if x.numel()}
    wanted = {"x": leaf, **dict(made.named_parameters()), **dict(zip(("before", "state_before"), states, strict=False))}
    wanted = {name: x for name, x in wanted.items() if x.numel()}
    generator = torch.Generator().manual_seed(call.seed + 1)
    incoming = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in found.values()]
    gradients = torch.autograd.grad(list(found.values()), list(wanted.values()), incoming, materialize_grads=True)
    named = {f"d{name}": x for name, x in zip(wanted, gradients, strict=True)}
    return {name: x.detach() for name, x in found.items()} | named


def decoded(made: nn.Module, call: LayerCall) -> dict[str, Tensor]:
    """Return what a prompt in two pieces and the tokens after it give, one by one, and what is in the cache then."""
    batch, steps = call.x.shape[:2]
    with torch.no_grad():
        cache: Any = made.allocate_cache(batch, call.x.device, call.x.dtype)  # type: ignore[operator]
        cuts = (0, steps // 3, steps // 2, *range(steps // 2 + 1, steps + 1))
        pieces = [made(call.x[:, a:b], cache) for a, b in pairwise(cuts) if b > a]
    every = {"y": torch.cat(pieces, 1), "conv": cache.conv, "state": cache.state}
    return {name: x for name, x in every.items() if x.numel()}


def known(
    subject: CaseContext,
    made: nn.Module,
    call: LayerCall,
    run: Callable[[nn.Module, LayerCall], dict[str, Tensor]] = results,
) -> Oracle:
    """Return the exact results of ``run``, and budgets from layers whose modules and operator round as kernels must."""
    wide: Any = copy.deepcopy(made).double()
    wide.backend = "reference"
    exact = run(wide, _double(call))
    errors: dict[str, float] = dict.fromkeys(exact, 0.0)
    for i in range(DRAWS):
        order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(subject.seed + i)).to(call.x.device)
        with _rounding(subject, i):
            found = run(_shuffled(made, order), call._replace(x=call.x[..., order]))
        back = order.argsort()
        for tensor, wanted in exact.items():
            x = found[tensor][..., back] if tensor in ("dx", "dinput_projection.weight") else found[tensor]
            errors[tensor] = max(errors[tensor], relative_error(x, wanted))
    dtypes = {name: result.dtype for name, result in found.items()}
    budgets = {name: FACTOR * errors[name] + torch.finfo(dtypes[name]).eps / 2 for name in exact}
    return Oracle(exact, budgets, dtypes)


def _double(call: LayerCall) -> LayerCall:
    states = None if call.states is None else (call.states[0].double(), call.states[1].double())
    return call._replace(x=call.x.double(), states=states)


def _shuffled(made: nn.Module, order: Tensor) -> nn.Module:
    """Return the layer for inputs whose channels are in another order, by its modules: the same, rounded otherwise.

    dt_bias moves by one of its last place, or not, so that gates near 1 are rounded otherwise, too.
    """
    other: Any = copy.deepcopy(made)
    other.fused = False
    with torch.no_grad():
        other.input_projection.weight.copy_(other.input_projection.weight[:, order])
        bias = other.decay_gate.dt_bias
        signs = (torch.arange(bias.numel(), device=bias.device) + order[0]).remainder(3).sub(1)
        bias.mul_(1 + signs * torch.finfo(torch.float32).eps)
    moved: nn.Module = other
    return moved


@contextmanager
def _rounding(subject: CaseContext, draw: int) -> Iterator[None]:
    """Have the layer's modules call the eager operator with the kernels' roundings, on another grid each draw."""
    grid = 2.0 ** (draw / DRAWS)
    operator: Operator = eager(subject.variant, replace(own_arithmetic(subject.variant), grid=grid))

    def call(*operands: Any, cu_seqlens_cpu: Any = None, backend: Any = None, **facts: Any) -> tuple[Tensor, Tensor]:
        *tensors, clip = operands
        return operator(*tensors, clip=clip, **facts)

    def step(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, forget: Tensor, state: Tensor, **facts: Any) -> Any:
        rows = (x.unsqueeze(1) for x in (q, k, v))
        y, after = operator(*rows, weight, forget.unsqueeze(1), state, None, clip=None, **facts)
        state.copy_(after)
        return y[:, 0], state

    modules: list[tuple[Any, str, Any]] = [
        (subject.submodule("scan"), "m2rnn", call), (subject.submodule("decode"), "m2rnn_step", step)
    ]  # fmt: skip
    kept = [getattr(module, name) for module, name, _ in modules]
    for module, name, other in modules:
        setattr(module, name, other)
    try:
        yield
    finally:
        for (module, name, _), other in zip(modules, kept, strict=True):
            setattr(module, name, other)
