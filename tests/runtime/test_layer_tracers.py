"""The layer under what watches tensors instead of computing them, or computes more: transforms, tracers, meta, fake."""

from __future__ import annotations

import warnings
from types import ModuleType

import pytest
import torch
from calls import Results, assert_alike, assert_close, assert_same, offsets_of
from layer import HIDDEN, SHAPES, layered, make_layer, tokens
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp
from torch.fx.experimental.symbolic_shapes import ShapeEnv

BACKENDS = ("kernels", "reference")
MASK = ((1, 1, 1, 0, 1), (1, 1, 1, 1, 1))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the package that serves the layers of these tests."""
    return layered(tmp_path_factory.mktemp("traced"))


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_a_functional_call(package, device, shape, backend, packed) -> None:
    """``torch.func.grad`` and ``vjp`` of the layer as a function of its parameters are autograd's gradients."""
    layer, x = make_layer(package, shape, backend=backend).to(device), tokens(device, 2, 5)
    x, call = (x.flatten(0, 1), {"cu_seqlens": offsets_of((4, 6)).to(device)}) if packed else (x, {})
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(given: Results) -> Tensor:
        return functional_call(layer, given, (x,), call).square().sum()

    found = torch.autograd.grad(layer(x, **call).square().sum(), list(layer.parameters()))
    expected = dict(zip(parameters, found, strict=True))
    assert_close(grad(loss)(parameters), expected, 2e-6)
    value, pull = vjp(loss, parameters)
    assert_close(pull(torch.ones_like(value))[0], expected, 2e-6)


@pytest.mark.parametrize("wrt", ["x", "parameters"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tangent_is_computed_or_refused(package, device, backend, wrt) -> None:
    """A forward-mode tangent that reaches the operator is right, or one line names it: never 0, None or another."""
    layer, x = make_layer(package, "softplus", backend=backend, clip=None).to(device), tokens(device, 2, 5)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    point = x if wrt == "x" else parameters["conv1d.weight"]
    tangent = torch.ones_like(point)

    def call(given: Tensor) -> Tensor:
        if wrt == "x":
            return functional_call(layer, parameters, (given,))
        return functional_call(layer, {**parameters, "conv1d.weight": given}, (x,))

    refusal = None
    try:
        y, found = jvp(call, (point,), (tangent,))
    except (RuntimeError, NotImplementedError) as error:
        refusal = str(error)
    if refusal is not None:
        assert "m2rnn" in refusal
        return
    leaf = point.clone().requires_grad_()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(device)
    (gradient,) = torch.autograd.grad(call(leaf), leaf, weights)
    assert (found * weights).sum().item() == pytest.approx((gradient * tangent).sum().item(), rel=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_tangent_never_gets_into_a_cache(package, device, steps) -> None:
    """If the operator refuses a tangent, the cache is unchanged."""
    layer, x = make_layer(package, "softplus").to(device), tokens(device, 2, 4)
    cache = layer.allocate_cache(2)
    with torch.no_grad(), forward_ad.dual_level():
        layer(x[:, :4], cache)
        before = {"conv": cache.conv.clone(), "state": cache.state.clone()}
        dual = forward_ad.make_dual(x[:, :steps], torch.ones_like(x[:, :steps]))
        with pytest.raises((RuntimeError, NotImplementedError), match="m2rnn"):
            layer(dual, cache)
        assert_same({"conv": cache.conv, "state": cache.state}, before)
        assert forward_ad.unpack_dual(cache.conv).tangent is None


def every_shape(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the results of each way to call a layer on (2, 5) tokens."""
    offsets = torch.tensor([0, 4, 10], device=x.device)
    results = [layer(x), layer(x.flatten(0, 1), cu_seqlens=offsets)]
    with torch.no_grad():
        cache, mask = layer.allocate_cache(2), torch.tensor(MASK, device=x.device)
        results += [layer(x, cache), layer(x[:, :1], cache), layer(x[:, :1], cache, attention_mask=mask[:, :1])]
        results += [layer(x, attention_mask=mask), layer(x, cache, attention_mask=mask)]
    return [*results, *layer.scan(x)]


SHAPES_OF = [(2, 5), (10,), (2, 5), (2, 1), (2, 1), (2, 5), (2, 5), (2, 5)]


def assert_shapes(layer: nn.Module, results: list[Tensor]) -> None:
    """Fail unless results have the shapes of what was asked for."""
    *ys, conv, state = results
    assert [tuple(y.shape) for y in ys] == [(*lead, HIDDEN) for lead in SHAPES_OF]
    assert tuple(conv.shape) == (2, 3, layer.conv1d.in_channels)
    assert tuple(state.shape) == (2, layer.total_heads, layer.state_expansion, layer.head_dim)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_meta_tensors(package, shape, backend) -> None:
    """A layer on the meta device says every call's shapes and dtypes, and reads no value."""
    with torch.device("meta"):
        layer = package.M2RNN(HIDDEN, **SHAPES[shape], backend=backend, dtype=torch.bfloat16)
        x = torch.empty(2, 5, HIDDEN, dtype=torch.bfloat16)
    results = every_shape(layer, x)
    assert_shapes(layer, results)
    assert all(result.is_meta for result in results)
    assert [result.dtype for result in results] == [torch.bfloat16] * 9 + [torch.float32]
    results[0].sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_fake_tensors(package, device, shape) -> None:
    """A fake layer says every call's shapes, and those of all gradients; a padded batch's tokens are a symbol."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        layer = package.M2RNN(HIDDEN, **SHAPES[shape], device=device)
        results = every_shape(layer, torch.randn(2, 5, HIDDEN, device=device))
        assert_shapes(layer, results)
        assert {result.device.type for result in results} == {device.type}
        results[0].sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_traced_layer(package, device, shape, backend) -> None:
    """``torch.jit.trace`` without gradients records the layer: other inputs of that shape give the layer's bits."""
    layer, x = make_layer(package, shape, backend=backend).to(device), tokens(device, 2, 5)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, which is deprecated, and of the shapes that it takes as constants
        traced = torch.jit.trace(layer, (x,))
        other = tokens(device, 2, 5, seed=2)
        assert_alike({"y": traced(other)}, {"y": layer(other)}, device)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_exported_layer(package, device, shape) -> None:
    """An exported layer takes other lengths than that it was exported with, and gives the layer's bits."""
    layer, x = make_layer(package, shape).to(device), tokens(device, 2, 5)
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({1: length},)).module()
    other = tokens(device, 2, 7)
    assert_same({"y": exported(other)}, {"y": layer(other)})


def test_a_compiled_layer_with_a_cache(package, device) -> None:
    """Prompts and steps of several batches are one graph each, and move the cache on as eager ones do."""
    layer = make_layer(package).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3):
            x, given, expected = tokens(device, batch, 5), layer.allocate_cache(batch), layer.allocate_cache(batch)
            for start, end in ((0, 3), (3, 4), (4, 5)):
                assert_close({"y": compiled(x[:, start:end], given)}, {"y": layer(x[:, start:end], expected)}, 2e-6)
            states = ({"conv": cache.conv, "state": cache.state} for cache in (given, expected))
            assert_close(*states, 2e-6)


def test_layers_of_one_shape_share_what_is_compiled(package, device) -> None:
    """The number by which caches know their layer is nothing that a compiler learns."""
    layers = [make_layer(package).to(device) for _ in range(3)]
    compiled = torch.compile(lambda layer, x, cache: layer(x, cache), fullgraph=True, backend="aot_eager")
    x = tokens(device, 2, 3)
    with torch.no_grad():
        compiled(layers[0], x, layers[0].allocate_cache(2))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for layer in layers[1:]:
                compiled(layer, x, layer.allocate_cache(2))
