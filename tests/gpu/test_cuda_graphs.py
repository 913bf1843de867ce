"""Capture and replay: of training steps, decoding and packed batches, each on operands that change between replays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from calls import arguments, assert_same, changed, differentiate, packed
from support import make_variant
from torch import Tensor

from m2gen.problem import Inputs, Problem, make_inputs

pytestmark = pytest.mark.gpu

HEADS = (1, 1, 4, 2, 4)
VARIANTS = {
    "given": make_variant(heads=HEADS, dtype="bf16"),
    "softplus": make_variant(heads=HEADS, dtype="bf16", gate="softplus"),
}
WARM = 3
"""Runs before a capture."""
FLOATS = ("q", "k", "v", "weight", "forget", "initial_state", "A_log", "dt_bias", "dy", "dstate")


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Warm up on a stream of its own, as torch asks for, then capture; return the graph and what it will write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def overwrite(static: Inputs, fresh: Inputs) -> None:
    """Write new numbers to where a graph reads."""
    with torch.no_grad():
        for name in FLOATS:
            x: Tensor | None = getattr(static, name)
            if x is not None:
                x.copy_(getattr(fresh, name))


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_training_step(built, device, name, flat) -> None:
    """Forward and backward in one graph give, at each replay, what an eager step on the new operands gives."""
    variant = VARIANTS[name]
    operator = built(variant).m2rnn

    def draw(seed: int) -> Inputs:
        inputs = make_inputs(variant, Problem(2, 37, initial_state=True), seed).to(device)
        return packed(inputs) if flat else inputs

    static = draw(0)
    graph, results = capture(lambda: differentiate(operator, static, deterministic=True))
    for seed in (1, 2, 0):
        overwrite(static, fresh := draw(seed))
        graph.replay()
        assert_same({key: x.clone() for key, x in results.items()}, differentiate(operator, fresh, deterministic=True))


def test_offsets_that_change_between_replays(built, device) -> None:
    """A captured packed call follows its offsets: the same tokens, cut elsewhere."""
    variant = VARIANTS["given"]
    operator = built(variant).m2rnn
    static = packed(make_inputs(variant, Problem(2, 32, initial_state=True), 0).to(device))
    graph, results = capture(lambda: differentiate(operator, static, deterministic=True))
    for cut in (32, 5, 0, 64):
        offsets = torch.tensor([0, cut, 64], dtype=torch.int32, device=device)
        static.cu_seqlens.copy_(offsets)
        graph.replay()
        expected = differentiate(operator, replace(static, cu_seqlens=offsets), deterministic=True)
        assert_same({key: x.clone() for key, x in results.items()}, expected)


def test_offsets_of_a_replay_that_lie_harm_nothing(built, device) -> None:
    """A replay cannot refuse offsets; it must still stay inside the tensors, and the next replay be right."""
    variant = VARIANTS["given"]
    operator = built(variant).m2rnn
    static = packed(make_inputs(variant, Problem(2, 32, initial_state=True), 0).to(device))
    graph, results = capture(lambda: differentiate(operator, static, deterministic=True))
    good = static.cu_seqlens.clone()
    for lie in ([5, 3, 64], [0, 1 << 30, 64], [-7, 2, 1 << 30]):
        static.cu_seqlens.copy_(torch.tensor(lie, dtype=torch.int32, device=device))
        graph.replay()
        torch.cuda.synchronize()
    static.cu_seqlens.copy_(good)
    graph.replay()
    expected = differentiate(operator, replace(static, cu_seqlens=good), deterministic=True)
    assert_same({key: x.clone() for key, x in results.items()}, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding(built, device, name) -> None:
    """A captured step advances its state at each replay, as that many eager steps do."""
    variant = VARIANTS[name]
    step = built(variant).m2rnn_step
    inputs = make_inputs(variant, Problem(3, 6, initial_state=True), 0).to(device)
    per_step = ("q", "k", "v", "forget")
    shared = arguments(inputs, ("weight", "A_log", "dt_bias"))
    token = {key: getattr(inputs, key)[:, 0].clone() for key in per_step}
    state = inputs.initial_state.clone()
    graph, (y, returned) = capture(lambda: step(**token, **shared, state=state))
    assert returned.data_ptr() == state.data_ptr()
    state.copy_(inputs.initial_state)
    expected = inputs.initial_state.clone()
    for t in range(6):
        for key in per_step:
            token[key].copy_(getattr(inputs, key)[:, t])
        graph.replay()
        eager, _ = step(**{key: getattr(inputs, key)[:, t] for key in per_step}, **shared, state=expected)
        assert torch.equal(y, eager)
        assert torch.equal(state, expected)


def training(operator: Callable[..., Any], inputs: Inputs) -> tuple[list[Tensor], Callable[[], None]]:
    """Return float32 parameters of their own, and a step of AdamW on them, which reads all else where it lies."""
    given = arguments(inputs)
    trained = {name: given[name].float().clone().requires_grad_() for name in ("weight", "initial_state")}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2, capturable=True)

    def step() -> None:
        optimiser.zero_grad()
        y, state = operator(**{**given, **trained}, deterministic=True)
        torch.autograd.backward([y, state], [inputs.dy.to(y.dtype), inputs.dstate.to(state.dtype)])
        optimiser.step()

    return list(trained.values()), step


def test_a_whole_optimiser_step(built, device) -> None:
    """Forward, backward and AdamW in one graph train parameters, replay by replay, as eager steps do."""
    variant = VARIANTS["given"]
    operator = built(variant).m2rnn

    def draw(seed: int) -> Inputs:
        return make_inputs(variant, Problem(2, 37, initial_state=True), seed).to(device)

    static, other = draw(0), draw(0)
    parameters, step = training(operator, static)
    expected, eager = training(operator, other)
    graph, _ = capture(step)
    for _ in range(WARM):
        eager()
    for seed in (1, 2, 0):
        before = [x.detach().clone() for x in parameters]
        for inputs in (static, other):
            overwrite(inputs, draw(seed))
        graph.replay()
        eager()
        for x, y, old in zip(parameters, expected, before, strict=True):
            assert torch.equal(x, y)
            assert x.isfinite().all()
            assert not torch.equal(x, old)


def test_a_graphed_callable(built, device) -> None:
    """torch.cuda.make_graphed_callables takes a function of the operator, forward and backward."""
    variant = VARIANTS["given"]
    operator = built(variant).m2rnn
    inputs = make_inputs(variant, Problem(2, 16), 0).to(device)
    leaves = arguments(changed(inputs, FLOATS, lambda x: x.detach().requires_grad_()), FLOATS[:5])

    def function(q, k, v, weight, forget):
        return operator(q, k, v, weight, forget, deterministic=True)[0]

    graphed = torch.cuda.make_graphed_callables(function, tuple(leaves.values()))
    expected = torch.autograd.grad(function(*leaves.values()), leaves.values(), inputs.dy)
    given = torch.autograd.grad(graphed(*leaves.values()), leaves.values(), inputs.dy)
    assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))
