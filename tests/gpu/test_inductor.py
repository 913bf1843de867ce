"""torch.compile with inductor: one graph, forward and backward, and no recompilation for a new length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import assert_close, differentiate
from layer import Mixer, trained
from support import make_variant

from m2gen.problem import Inputs, Problem, make_inputs

pytestmark = pytest.mark.gpu

VARIANT = make_variant(heads=(1, 1, 2, 2, 2), dtype="bf16")
LAYER = make_variant(heads=(1, 1, 2, 2, 2))
# The operator is a black box to inductor, so results differ by what inductor does to the casts around it, at most.
TOLERANCE = 2.0**-20


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(device: torch.device, batch: int, steps: int) -> Inputs:
    """Return operands of ``batch`` sequences."""
    return make_inputs(VARIANT, Problem(batch, steps, initial_state=True), batch + steps).to(device)


def check(package: ModuleType, compiled: Callable[..., Any], inputs: Inputs) -> None:
    """Fail unless the compiled operator gives the eager one's results and gradients."""
    expected = differentiate(package.m2rnn, inputs, deterministic=True)
    assert_close(differentiate(compiled, inputs, deterministic=True), expected, TOLERANCE)


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_no_recompilation_for_new_lengths(built, device, dynamic) -> None:
    """After the first size (or the second, which makes sizes symbols), any batch and length runs what is there.

    The first batches are no head counts: torch takes sizes that are equal at first to be equal always.
    """
    package = built(VARIANT)
    compiled = torch.compile(package.m2rnn, fullgraph=True, dynamic=dynamic)
    for batch, steps in ((3, 64), (4, 65))[: 1 if dynamic else 2]:
        check(package, compiled, draw(device, batch, steps))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, steps in ((5, 63), (2, 200), (6, 3)):
            check(package, compiled, draw(device, batch, steps))


def test_a_layer_in_training(built, device) -> None:
    """A compiled layer trains as the layer does, with projections that inductor fuses."""
    torch.manual_seed(0)
    layer = Mixer(built(LAYER).m2rnn).to(device)
    compiled = torch.compile(layer, fullgraph=True)
    for steps in (32, 48):
        x = torch.randn(2, steps, 8, device=device)
        given, expected = trained(compiled, x), trained(layer, x)
        # inductor's float32 matrix products and sums are in another order than torch's
        assert_close(dict(zip(expected, given.values(), strict=True)), expected, 1e-4)


def test_reduce_overhead_uses_cuda_graphs(built, device) -> None:
    """Under mode="reduce-overhead", which captures graphs of its own, repeated calls stay right."""
    package = built(VARIANT)
    compiled = torch.compile(package.m2rnn, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        inputs = make_inputs(VARIANT, Problem(2, 64, initial_state=True), seed).to(device)
        torch.compiler.cudagraph_mark_step_begin()
        given = {name: x.clone() for name, x in differentiate(compiled, inputs, deterministic=True).items()}
        assert_close(given, differentiate(package.m2rnn, inputs, deterministic=True), TOLERANCE)
