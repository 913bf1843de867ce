"""The operator under torch.compile: one graph, forward and backward, for every batch and length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import assert_close, differentiate, packed
from layer import Mixer, trained
from support import make_variant

from m2gen.problem import Inputs, Problem, make_inputs

EPS = torch.finfo(torch.float32).eps


def draw(device: torch.device, batch: int = 1, steps: int = 3) -> Inputs:
    """Return operands of ``batch`` sequences."""
    return make_inputs(make_variant(), Problem(batch, steps, initial_state=True), seed=batch + steps).to(device)


@pytest.fixture
def package(modules) -> ModuleType:
    """Return a package whose sums do not depend on the order of programs."""
    return modules("two_level_partial", "carry")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Forget what other tests compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _same_as_eager(package: ModuleType, compiled: Callable[..., Any], inputs: Inputs, **options: Any) -> None:
    expected = differentiate(package.m2rnn, inputs, **options)
    assert_close(differentiate(compiled, inputs, **options), expected, 4 * EPS)


def test_compiled_once_for_any_batch_and_length(package, device) -> None:
    """One graph; a second size makes B and S symbols; no size after that compiles again, forward or backward."""
    compiled = torch.compile(package.m2rnn, fullgraph=True, backend="aot_eager")
    for batch, steps in ((2, 3), (3, 4)):
        _same_as_eager(package, compiled, draw(device, batch, steps))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, steps in ((4, 2), (2, 5)):
            _same_as_eager(package, compiled, draw(device, batch, steps))


def test_compiled_with_dynamic_sizes_from_the_start(package, device) -> None:
    """With dynamic=True the first graph serves every batch and length.

    The first batch is no head count: torch takes sizes that are equal at first to be equal always, and heads are fixed.
    """
    compiled = torch.compile(package.m2rnn, fullgraph=True, dynamic=True, backend="aot_eager")
    _same_as_eager(package, compiled, draw(device, 3, 4))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, steps in ((4, 3), (2, 5)):
            _same_as_eager(package, compiled, draw(device, batch, steps))


def test_compiled_for_packed_batches(package, device) -> None:
    """Offsets that change, and their number, do not compile again."""
    compiled = torch.compile(package.m2rnn, fullgraph=True, dynamic=True, backend="aot_eager")
    _same_as_eager(package, compiled, packed(draw(device, 3, 2)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        _same_as_eager(package, compiled, packed(draw(device, 4, 2)))


def test_a_compiled_call_refuses_what_an_eager_one_does(package, device) -> None:
    """Checks of shapes are part of what is compiled."""
    compiled = torch.compile(package.m2rnn, fullgraph=True, backend="aot_eager")
    inputs = draw(device)
    with pytest.raises(Exception, match="k must begin with"):
        compiled(inputs.q, inputs.k[:, 1:], inputs.v, inputs.weight, inputs.forget)


def test_compiled_decoding(package, device) -> None:
    """A compiled step updates the caller's state, for any batch."""
    compiled = torch.compile(package.m2rnn_step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        inputs = draw(device, batch, 1)
        token = {name: getattr(inputs, name)[:, 0] for name in ("q", "k", "v", "forget")}
        states = [inputs.initial_state.clone() for _ in range(2)]
        y, returned = compiled(**token, weight=inputs.weight, state=states[0])
        expected, _ = package.m2rnn_step(**token, weight=inputs.weight, state=states[1])
        assert torch.equal(y, expected)
        assert torch.equal(states[0], states[1])
        assert torch.equal(returned, states[1])


def test_compiled_module_in_training(package, device) -> None:
    """A compiled module trains as the module does."""
    torch.manual_seed(0)
    module, x = Mixer(package.m2rnn).to(device), torch.randn(2, 3, 8).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(
        trained(compiled, x), {f"_orig_mod.{n}" if n != "y" else n: g for n, g in trained(module, x).items()}, 8 * EPS
    )
