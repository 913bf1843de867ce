"""The layer on the default kernels of this GPU, whose layouts are written down: the interpreter runs none of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from calls import Results, distance, module_of
from layer import assert_within, budgets, in_pieces, make_layer, tokens, twin, with_gradients
from support import make_variant
from torch import Tensor, nn

pytestmark = pytest.mark.gpu

HEADS = {"given": (1, 1, 16, 16, 16), "softplus": (2, 1, 16, 16, 16)}
"""Head counts of q, k, v, f and w. A budget needs more than a few of f: their gradients have one number a head."""
VARIANTS = {
    "given": make_variant(64, 16, HEADS["given"], "bf16"),
    "softplus": make_variant(9, 9, HEADS["softplus"], "bf16", gate="softplus"),
}
STEPS = 20
"""More steps than between two checkpoints of a default schedule."""


@dataclass(frozen=True)
class Subject:
    """A layer in bf16, two sequences, and what float64 makes of them."""

    package: ModuleType
    layer: nn.Module
    x: Tensor
    exact: Results
    allowed: dict[str, float]
    """Relative errors, by the name of the result."""


@pytest.fixture(scope="module", params=VARIANTS)
def subject(built, device, request: pytest.FixtureRequest) -> Subject:
    """Return a layer whose gate is given to the operator, or computed by it."""
    variant = VARIANTS[request.param]
    heads = {**dict(zip("qkvfw", HEADS[request.param], strict=True)), "g": 8}
    package = built(variant)
    layer = make_layer(package, request.param, state_expansion=variant.state_expansion, heads=heads)
    layer, x = layer.to(device, torch.bfloat16), tokens(device, 2, STEPS).bfloat16()
    exact = with_gradients(twin(layer, torch.float64), x.double())
    return Subject(package, layer, x, exact, budgets(exact, twin(layer, torch.bfloat16), x, torch.bfloat16))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_the_layouts_are_explicit(subject, device) -> None:
    """The layer runs on explicit layouts, which these tests are about, with every Triton."""
    dispatch = module_of(subject.package, "dispatch")
    (key,) = dispatch.built.VARIANTS
    kernels, _ = dispatch.table_of(key, device)
    assert all(hasattr(module, "gluon") for module in kernels)


def test_outputs_and_every_gradient_against_float64(subject) -> None:
    """The output, and the gradients of the input and of all parameters, are within what bf16 leaves them."""
    assert_within(with_gradients(subject.layer, subject.x), subject.exact, subject.allowed)


def test_inductor(subject) -> None:
    """Compiled to one graph, the layer is within the eager one's budgets, forward and backward, and close to it."""
    eager = with_gradients(subject.layer, subject.x)
    compiled = with_gradients(torch.compile(subject.layer, fullgraph=True), subject.x)
    given = dict(zip(eager, compiled.values(), strict=True))
    assert_within(given, subject.exact, subject.allowed)
    assert_within(given, eager, subject.allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_prefill_and_decoding_equal_the_full_call(subject, dtype) -> None:
    """y is within what bf16 leaves it; a state kept in bf16 adds what its roundings do in float64, doubled."""
    cache = subject.layer.allocate_cache(2, state_dtype=dtype)
    y = in_pieces(subject.layer, subject.x, cache)
    assert cache.state.dtype == dtype
    exact, wide, rounds = twin(subject.layer, torch.float64), subject.x.double(), dtype == torch.bfloat16
    rounded = distance(in_pieces(exact, wide, exact.allocate_cache(2), rounds=rounds), subject.exact["y"])
    with torch.no_grad():
        full = subject.layer(subject.x)
    for expected in (full, subject.exact["y"]):
        assert distance(y, expected) <= subject.allowed["y"] + 2 * rounded


def test_a_step_with_a_mask_never_waits(subject) -> None:
    """Sequences without a token stay where they are and give 0, and the host never asks which they are."""
    layer, x = subject.layer, subject.x
    cache, mask = layer.allocate_cache(2), torch.tensor([[True], [False]], device=x.device)
    in_pieces(layer, x[:, :6], cache)  # compiles the step, too
    before = cache.conv.clone(), cache.state.clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            y = layer(x[:, 6:7], cache, attention_mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for now, then in zip((cache.conv, cache.state), before, strict=True):
        assert torch.equal(now[1], then[1])
        assert not torch.equal(now[0], then[0])
    assert bool((y[1] == 0).all())


def test_packed_training_with_offsets_of_the_host_never_waits(subject) -> None:
    """Forward and backward of a packed batch read nothing from the device where a copy of the offsets comes along."""
    layer, x = subject.layer, subject.x.flatten(0, 1)
    host = torch.tensor([0, 3, 3, x.shape[0]], dtype=torch.int32)
    offsets = [host.to(x.device) for _ in range(2)]
    layer(x, cu_seqlens=offsets[0], cu_seqlens_cpu=host).float().square().sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, cu_seqlens=offsets[1], cu_seqlens_cpu=host).float().square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
