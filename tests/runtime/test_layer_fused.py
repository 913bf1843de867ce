"""A layer by kernels of its own between the projections: against float64, and where modules must do their work."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import assert_close, distance, module_of, offsets_of
from layer import GATED, HIDDEN, PLAIN, layered, loss_weights, tokens, twin
from support import SCHEDULES, build_package, import_package, make_variant
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

LENGTHS = (1, 0, 2, 9)
"""Lengths of packed sequences: shorter than the convolution, empty, and longer."""
OPTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "biased": {"bias": True},
    "two wide": {"conv_width": 2, "bias": True},
    "three wide": {"conv_width": 3, "activation": None},
    "one wide": {"conv_width": 1},
    "no convolution": {"conv_width": None},
    "bare": {"norm": None, "residual": False},
}
UNLIKE: dict[str, dict[str, Any]] = {
    "off": {"fused": False},
    "reference": {"backend": "reference"},
    "wide": {"conv_width": 5},
    "another activation": {"activation": "gelu"},
    "another norm": {"norm": "layernorm"},
    "shared gate inputs": {"forget_inputs": 1},
    "shared output gates": {"heads": {**PLAIN["heads"], "g": 1}},
}
ROUNDINGS = 48
"""Roundings of float32 that a result may be away, in units of its norm; bf16's results have one more of their own."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the package that serves the layers of these tests."""
    return layered(tmp_path_factory.mktemp("fused"))


def drawn(package: ModuleType, shape: dict[str, Any] = PLAIN, **options: Any) -> nn.Module:
    """Return a layer none of whose parameters is a one or a zero, and whose gates are away from 1."""
    torch.manual_seed(0)
    layer = package.M2RNN(HIDDEN, **{**shape, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        layer.decay_gate.A_log.sub_(2)
        layer.decay_gate.dt_bias.add_(2)
    return layer


def served(package: ModuleType, layer: nn.Module, x: Tensor) -> bool:
    """Return whether the layer's own kernels would serve a call."""
    answer: bool = module_of(package, "fused").serves(layer, x)
    return answer


def results(layer: nn.Module, x: Tensor, states: tuple[Tensor, Tensor] | None, offsets: Tensor | None) -> Any:
    """Return what ``scan`` gives, and every gradient of an uneven loss of all three results."""
    leaf = x.detach().requires_grad_()
    given = () if states is None else tuple(state.detach().to(x.dtype).requires_grad_() for state in states)
    found = layer.scan(leaf, *(given or (None, None)), offsets)
    wanted = {"x": leaf, **dict(layer.named_parameters()), **dict(zip(("conv", "state"), given, strict=False))}
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.numel()}
    loss = sum((part.to(torch.float64) * loss_weights(part.to(torch.float64))).sum() for part in found if part.numel())
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    names = ("y", "conv after", "state after")
    return dict(zip(names, found, strict=True)) | dict(zip([f"d{name}" for name in wanted], gradients, strict=True))


@pytest.mark.parametrize(
    ("packed", "begun", "aligned"),
    [(False, False, False), (False, True, True), (True, False, True), (True, True, False)],
    ids=["dense", "dense from states, aligned", "packed, aligned", "packed from states"],
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_result_and_gradient_against_float64(
    package, device, options, packed, begun, aligned, monkeypatch
) -> None:
    """Outputs, states and all gradients are those of the reference in float64, packed or not, from states or not."""
    monkeypatch.setattr(module_of(package, "fused"), "LEAST_TOKENS", 1 if aligned else 1 << 30)
    layer = drawn(package, **options).to(device)
    x = tokens(device, sum(LENGTHS)) if packed else tokens(device, 2, 6)
    offsets = offsets_of(LENGTHS).to(device) if packed else None
    batch, states = len(LENGTHS) if packed else 2, None
    if begun and layer.conv_width:  # the gradient of no inputs is none
        cache = layer.allocate_cache(batch)
        states = (torch.randn_like(cache.conv), torch.randn_like(cache.state))
    assert served(package, layer, x)
    exact = results(twin(layer, torch.float64), x.double(), states and tuple(s.double() for s in states), offsets)
    given = results(layer, x, states, offsets)
    assert given.keys() == exact.keys()
    eps = torch.finfo(torch.float32).eps
    errors = {name: distance(given[name], exact[name]) for name in exact if exact[name].numel()}
    assert {name: error for name, error in errors.items() if not error <= ROUNDINGS * eps} == {}


@pytest.mark.parametrize("gate", ["given", "softplus"])
def test_bf16_beside_modules(package, device, gate, tmp_path: Path) -> None:
    """With 16 bits, errors against float64 are no larger than where modules round every result between them."""
    variant = make_variant(dtype="bf16", gate=gate)
    module = import_package(
        tmp_path / "p", build_package("p", [variant], SCHEDULES["two_level_partial"]), f"m2gen_test_{tmp_path.name}"
    )
    totals = {True: 0.0, False: 0.0}
    for seed in range(4):
        layer = drawn(module).to(device, torch.bfloat16)
        x = tokens(device, 2, 12, seed=seed).bfloat16()
        assert served(module, layer, x)
        exact = results(twin(layer, torch.float64), x.double(), None, None)
        for fused in totals:
            layer.fused = fused
            found = results(layer, x, None, None)
            totals[fused] += sum(distance(found[name], exact[name]) for name in exact)
    assert totals[True] <= totals[False]


@pytest.mark.parametrize("shape", [PLAIN, GATED], ids=["plain", "grouped"])
def test_prefill_and_decoding_are_one_call(package, device, shape) -> None:
    """A prompt by the layer's kernels and tokens one by one after it give what one call on all of them does."""
    layer, x = drawn(package, shape).to(device), tokens(device, 2, 9)
    with torch.no_grad():
        cache = layer.allocate_cache(2, device=device)
        pieces = [layer(x[:, :2], cache), layer(x[:, 2:6], cache), *(layer(x[:, t : t + 1], cache) for t in (6, 7, 8))]
        assert_close({"y": torch.cat(pieces, 1)}, {"y": layer(x)}, 1e-5)


@pytest.mark.parametrize("options", UNLIKE.values(), ids=UNLIKE)
def test_layers_that_modules_compute(package, device, options) -> None:
    """Whatever the kernels do not compute is the modules' work."""
    layer = package.M2RNN(HIDDEN, **{**PLAIN, **options}).to(device)
    assert not served(package, layer, tokens(device, 1, 2))
    assert served(package, drawn(package).to(device), tokens(device, 1, 2))


@pytest.mark.parametrize("options", [UNLIKE["another norm"], UNLIKE["shared output gates"]], ids=["norm", "gates"])
def test_aligned_projections_where_modules_do_the_rest(package, device, options, monkeypatch) -> None:
    """Rows that are laid out anew are put back into the published order for the layer's modules."""
    monkeypatch.setattr(module_of(package, "fused"), "LEAST_TOKENS", 1)
    layer, x = drawn(package, bias=True, **options).to(device), tokens(device, 2, 6)
    shapes: list[torch.Size] = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: (shapes.append(a[1].shape), linear(*a))[1])
    given = results(layer, x, None, None)
    monkeypatch.undo()
    assert shapes[0][0] % 16 == 0
    assert shapes[0][0] > layer.input_projection.out_features
    exact = results(twin(layer, torch.float64), x.double(), None, None)
    errors = {name: distance(given[name], exact[name]) for name in exact}
    assert {name: e for name, e in errors.items() if not e <= ROUNDINGS * torch.finfo(torch.float32).eps} == {}


def _hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def _wrapped(module: nn.Module) -> None:
    module.forward = module.forward


@pytest.mark.parametrize("watch", [_hooked, _wrapped])
@pytest.mark.parametrize("child", ["input_projection", "conv1d", "decay_gate", "g_norm"])
def test_children_that_are_watched_are_called(package, device, child, watch) -> None:
    """A hook, or another forward, of a child that the kernels would pass by is run."""
    layer = drawn(package).to(device)
    watch(getattr(layer, child))
    assert not served(package, layer, tokens(device, 1, 2))
    watch(layer.output_projection)
    watch(layer)


def test_all_children_are_called_where_every_module_is_watched(package, device) -> None:
    """A hook of all modules, as profilers register, sees each of the layer's children."""
    layer, x = drawn(package).to(device), tokens(device, 1, 2)
    assert served(package, layer, x)
    seen: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        assert not served(package, layer, x)
        y = layer(x)
    finally:
        handle.remove()
    assert {layer.input_projection, layer.conv1d, layer.decay_gate, layer.g_norm, layer.output_projection} <= {*seen}
    assert served(package, layer, x)
    assert distance(layer(x), y) < 1e-5


def test_autocast(package, device) -> None:
    """Under autocast, parameters in float32 serve activations of 16 bits, and their gradients are float32."""
    layer, x = drawn(package).to(device), tokens(device, 2, 5)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    assert distance(y, twin(layer, torch.float64)(x.double())) < 2**-6


def test_frozen_parameters(package, device) -> None:
    """Gradients that nobody asks for are not computed, and the others are the same."""
    layer, x = drawn(package).to(device), tokens(device, 2, 5)
    layer(x).square().sum().backward()
    expected = {name: p.grad for name, p in layer.named_parameters()}
    for name in ("conv1d", "decay_gate", "g_norm", "input_projection"):
        other = drawn(package).to(device)
        getattr(other, name).requires_grad_(False)
        other(x).square().sum().backward()
        kept = {key: p.grad for key, p in other.named_parameters() if not key.startswith(name)}
        assert all(p.grad is None for p in getattr(other, name).parameters())
        assert all(torch.equal(gradient, expected[key]) for key, gradient in kept.items())


def recorded(package: ModuleType, layer: nn.Module, x: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """Return the layer's operator, and what a call of the layer hands to it."""
    fused, library = module_of(package, "fused"), module_of(package, "library")
    calls: list[tuple[Any, ...]] = []
    operator = library.OPERATORS.LAYER
    library.OPERATORS.LAYER = lambda *arguments: (calls.append(arguments), operator(*arguments))[1]
    try:
        fused.scan(layer, x, None, None, None, None)
    finally:
        library.OPERATORS.LAYER = operator
    return operator, tuple(a.detach() if isinstance(a, Tensor) else a for a in calls[0])


def test_rows_that_are_apart(package, device, monkeypatch) -> None:
    """Rows of the projection that a compiler put further apart are read where they are, and give the same bits."""
    operator, (rows, *rest) = recorded(package, drawn(package).to(device), tokens(device, 2, 5))
    wide = rows.new_full((*rows.shape[:-1], rows.shape[-1] + 16), torch.nan)
    wide[..., : rows.shape[-1]] = rows
    apart = wide[..., : rows.shape[-1]]
    expected = operator(rows, *rest)
    read = module_of(package, "library").OPERATORS.layer_library.layer_op
    seen: list[Tensor] = []
    forward = read.forward
    monkeypatch.setattr(read, "forward", lambda p, *more: (seen.append(p.projected), forward(p, *more))[1])
    found = operator(apart, *rest)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert [x.data_ptr() for x in seen] == [apart.data_ptr()]


def test_calls_alike_are_alike_in_all_that_kernels_are_handed(package, device, monkeypatch) -> None:
    """A launch is repeated only where every tensor lies as before: those that the forward saved, too."""
    op = module_of(package, "library").OPERATORS.layer_library.layer_op
    handed: list[int] = []
    known = op.call_like
    monkeypatch.setattr(
        op, "call_like", lambda t, rest: known([handed.append(0 if x is None else x.data_ptr()) or x for x in t], rest)
    )
    saved: list[Tensor] = []
    layer, x = drawn(package).to(device), tokens(device, 2, 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = layer(x)
    mixed = next(t for t in saved if t.shape == (2, 5, *layer.D.shape))
    handed.clear()
    y.sum().backward()
    assert mixed.data_ptr() in handed


def test_misused_offsets(package, device) -> None:
    """Offsets that are no integers, or on another device, are the operator's errors, before anything runs."""
    layer, x = drawn(package).to(device), tokens(device, 3)
    with pytest.raises(TypeError, match=r"m2rnn: cu_seqlens must be torch.int32 or torch.int64, got torch.float32"):
        layer(x, cu_seqlens=torch.tensor([0.0, 3.0], device=device))
    with pytest.raises(ValueError, match="m2rnn: cu_seqlens must be on"):
        layer(x, cu_seqlens=torch.empty(2, dtype=torch.int32, device="meta"))
    with pytest.raises(ValueError, match="m2rnn: cu_seqlens must end at the 3 tokens"):
        layer(x, cu_seqlens=torch.tensor([0, 2], device=device))


def test_operators_as_torch_wants_them(package, device) -> None:
    """Schemas, fake results, gradients under a compiler: torch's own checks of an operator pass."""
    served_by, calls = recorded(package, drawn(package).to(device), tokens(device, 2, 5))
    leaves = tuple(a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in calls)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(served_by, leaves, test_utils=tests)
