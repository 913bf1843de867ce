"""Wrappers of a module's ``forward`` work on every child of the layer, since the layer calls them and reads none."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import peft
import pytest
import torch
from calls import Results, assert_close, assert_same, offsets_of
from layer import SHAPES, layered, loss_weights, make_layer, tokens, with_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrize

CHILDREN = ("input_projection", "conv1d", "decay_gate", "g_norm", "output_projection")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the package that serves the layers of these tests."""
    return layered(tmp_path_factory.mktemp("wrapped"))


def apart(layer: nn.Module) -> nn.Module:
    """Return the layer, whose modules do everything whoever watches them; kernels of its own round otherwise."""
    layer.fused = False
    return layer


def every_call(layer: nn.Module, device: torch.device) -> Results:
    """Return the results of each way to call a layer: a batch, packed, padded, cached, step by step, and ``scan``."""
    x, offsets = tokens(device, 2, 5), offsets_of((6, 0, 1, 3)).to(device)
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]], device=device)
    with torch.no_grad():
        cache = layer.allocate_cache(2, device=device)
        y, conv, state = layer.scan(x)
        return {
            "batch": layer(x),
            "packed": layer(x.flatten(0, 1), cu_seqlens=offsets),
            "padded": layer(x, attention_mask=mask),
            "prompt": layer(x[:, :4], cache),
            "step": layer(x[:, 4:], cache),
            "masked step": layer(x[:, 4:], cache, attention_mask=mask[:, 3:4]),
            "cache conv": cache.conv,
            "cache state": cache.state,
            "scan": y,
            "scan conv": conv,
            "scan state": state,
        }


def parameters_of(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold parameters themselves, the layer among them, by name."""
    return {name: module for name, module in layer.named_modules() if list(module.parameters(recurse=False))}


class Hidden(nn.Module):
    """A module that calls another, and has none of its attributes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._inner = [inner]
        self.calls = 0

    def forward(self, *inputs: Any) -> Any:
        self.calls += 1
        return self._inner[0](*inputs)


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_child_is_read(package, device, shape, backend) -> None:
    """The layer needs nothing of a child but its forward, in whatever way it is called."""
    layer = apart(make_layer(package, shape, backend=backend).to(device))
    expected = every_call(layer, device)
    for name in CHILDREN:
        setattr(layer, name, Hidden(getattr(layer, name)))
    assert_same(every_call(layer, device), expected)
    calls = {name: getattr(layer, name).calls for name in CHILDREN}
    assert calls == dict.fromkeys(CHILDREN, 7)


class Parked:
    """Parameters that are there while their module runs, forward or backward, as those of FSDP or ZeRO-3 are."""

    def __init__(self, module: nn.Module, frees: bool) -> None:
        self.kept = {p: p.detach().clone() for p in module.parameters(recurse=False)}
        self.frees = frees
        self.fetched = 0
        module.register_forward_pre_hook(self.fetch)
        module.register_forward_hook(self.park)
        module.register_full_backward_pre_hook(self.fetch)
        self.park()

    def fetch(self, *_: Any) -> None:
        """Bring the values back, into the same memory if this frees it."""
        self.fetched += 1
        for parameter, value in self.kept.items():
            if self.frees:
                parameter.data.untyped_storage().resize_(value.untyped_storage().nbytes())
                parameter.data.copy_(value)
            else:
                parameter.data = value.clone()

    def park(self, *_: Any) -> None:
        """Take the values away."""
        for parameter in self.kept:
            if self.frees:
                parameter.data.untyped_storage().resize_(0)
            else:
                parameter.data = parameter.data.new_empty(0)


@pytest.mark.parametrize("frees", [False, True], ids=["as ZeRO", "as FSDP"])
@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_that_are_there_only_while_a_module_runs(package, device, shape, frees) -> None:
    """Results and gradients have the bits of a layer that holds its parameters all the time."""
    layer, x = apart(make_layer(package, shape).to(device)), tokens(device, 2, 5)
    expected, trained = every_call(layer, device), with_gradients(layer, x)
    other = copy.deepcopy(layer)
    parked = {name: Parked(module, frees) for name, module in parameters_of(other).items()}
    assert set(parked) == {"", *CHILDREN}
    assert_same(every_call(other, device), expected)
    assert_same(with_gradients(other, x), trained)
    assert all(one.fetched >= 9 for one in parked.values())


def test_states_of_scan_have_gradients_whose_parameters_are_parked(package, device) -> None:
    """``scan`` runs the layer's own hooks, before and after, and its states' gradients are the same."""
    layer, x = apart(make_layer(package).to(device)), tokens(device, 2, 5)
    results = []
    for wrap in (False, True):
        if wrap:
            for module in parameters_of(layer).values():
                Parked(module, frees=False)
        leaf = x.clone().requires_grad_()
        first, conv, state = layer.scan(leaf[:, :3])
        second, *_ = layer.scan(leaf[:, 3:], conv, state)
        y = torch.cat((first, second), 1)
        found = torch.autograd.grad(y, [leaf, *layer.parameters()], loss_weights(y))
        results.append({"y": y.detach(), **{str(i): gradient for i, gradient in enumerate(found)}})
    assert_same(*results)


def test_cpu_offload(package, device) -> None:
    """accelerate keeps every parameter on the CPU, meta tensors in their place, and each call has the layer's bits."""
    for shape, backend in (("given", "kernels"), ("softplus", "reference")):
        layer = apart(make_layer(package, shape, backend=backend).to(device))
        expected = every_call(layer, device)
        accelerate.cpu_offload(layer, execution_device=device)
        assert all(parameter.is_meta for parameter in layer.parameters())
        assert_same(every_call(layer, device), expected)


def test_dispatch_to_a_disk(package, device, tmp_path: Path) -> None:
    """accelerate loads children from a disk, one by one, as they are called; a cache is where the layer's own are."""
    layer = apart(make_layer(package).to(device))
    expected = every_call(layer, device)
    places: dict[str, Any] = dict.fromkeys(CHILDREN, "disk") | dict.fromkeys(("D", "state_weight", "g_norm"), device)
    accelerate.dispatch_model(layer, device_map=places, main_device=device, offload_dir=str(tmp_path))
    assert {name for name, p in layer.named_parameters() if not p.is_meta} == {"D", "state_weight", "g_norm.weight"}
    assert_same(every_call(layer, device), expected)
    assert layer.allocate_cache(1).state.device.type == device.type


def adapted(layer: nn.Module, **options: Any) -> tuple[peft.PeftModel, nn.Module]:
    """Return a model of one copied layer with LoRA's factors drawn, and what is now in the layer's place."""
    config = peft.LoraConfig(init_lora_weights=False, **options)
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    return model, model.base_model.model[0]


@pytest.mark.parametrize(("dora", "backend"), [(False, "kernels"), (True, "reference")], ids=["lora", "dora"])
def test_lora_on_the_projections(package, device, dora, backend) -> None:
    """Every call is that of the merged layer, and the factors have gradients."""
    layer, x = make_layer(package, backend=backend).to(device), tokens(device, 2, 5)
    model, inner = adapted(layer, r=4, use_dora=dora, target_modules=["input_projection", "output_projection"])
    given = every_call(inner, device)
    model(x).square().sum().backward()
    factors = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(factors) == (6 if dora else 4)
    assert all(gradient is not None and gradient.norm() > 0 for gradient in factors.values())
    assert all(p.grad is None for name, p in inner.named_parameters() if "lora" not in name)
    merged = model.merge_and_unload()[0]
    assert type(merged.input_projection) is nn.Linear
    assert_close(given, every_call(merged, device), 1e-5)
    assert not torch.allclose(given["batch"], layer(x))


@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_lora_on_the_convolution(package, device, backend, monkeypatch) -> None:
    """Factors over all channels see each sequence alone: the result is that of a convolution of dense weights."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of 11 bits, on a GPU
    layer, x = make_layer(package, backend=backend).to(device), tokens(device, 2, 5)
    channels, width = layer.conv1d.in_channels, layer.conv_width
    model, inner = adapted(layer, r=channels, lora_alpha=2 * channels, target_modules=["conv1d"])
    given = every_call(inner, device)
    model(x).square().sum().backward()
    down, up = inner.conv1d.lora_A["default"].weight, inner.conv1d.lora_B["default"].weight
    assert down.grad is not None
    assert up.grad is not None
    assert min(down.grad.norm(), up.grad.norm()) > 0
    dense = nn.Conv1d(channels, channels, width).to(device)
    base = torch.diag_embed(layer.conv1d.weight[:, 0].mT).permute(1, 2, 0)
    with torch.no_grad():
        dense.weight.copy_(base + 2 * up * down)  # a row of ``up`` (C, 1, 1) scales its channel's factor
        dense.bias.copy_(layer.conv1d.bias)
    merged = copy.deepcopy(layer)
    merged.conv1d = dense
    assert_close(given, every_call(merged, device), 2e-5)
    assert not torch.allclose(given["batch"], layer(x))


def test_lora_on_the_state_weight(package, device) -> None:
    """PEFT's factors of a bare parameter, which it adds while the layer runs, are the merged layer's."""
    layer, x = make_layer(package).to(device), tokens(device, 2, 5)
    model, _ = adapted(layer, r=4, target_modules=[], target_parameters=["0.state_weight"])
    given = model(x)
    given.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert_close({"y": given.detach()}, {"y": model.merge_and_unload()(x).detach()}, 2e-6)
    assert not torch.allclose(given, layer(x))


def test_copies_that_are_trained_in_place_of_a_child(package, device) -> None:
    """Children that PEFT saves whole are run and trained in place of the original, which keeps its values."""
    layer, x = make_layer(package, "softplus", backend="reference").to(device), tokens(device, 2, 5)
    saved = ["conv1d", "decay_gate", "g_norm"]
    model, inner = adapted(layer, r=4, target_modules=["output_projection"], modules_to_save=saved)
    with torch.no_grad():
        for name in saved:
            for parameter in getattr(inner, name).modules_to_save.parameters():
                parameter.mul_(1.25)
    expected = model.merge_and_unload()[0]
    assert not torch.equal(expected.decay_gate.A_log, layer.decay_gate.A_log)
    model, inner = adapted(layer, r=4, target_modules=["output_projection"], modules_to_save=saved)
    for name in saved:
        getattr(inner, name).modules_to_save["default"].load_state_dict(getattr(expected, name).state_dict())
    expected.output_projection = inner.output_projection
    assert_same(every_call(inner, device), every_call(expected, device))
    model(x).square().sum().backward()
    for name in saved:
        assert all(p.grad is not None for p in getattr(inner, name).modules_to_save.parameters())
        assert all(p.grad is None for p in getattr(inner, name).original_module.parameters())


class Doubled(nn.Module):
    """A parametrization that doubles."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("shape", SHAPES)
def test_parametrized_parameters(package, device, shape) -> None:
    """A parametrization of any parameter is the layer whose parameters have the values that it gives."""
    layer = make_layer(package, shape, backend="reference").to(device)
    doubled = copy.deepcopy(layer)
    for module in parameters_of(layer).values():
        for name, _ in list(module.named_parameters(recurse=False)):
            parametrize.register_parametrization(module, name, Doubled())
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    assert_close(every_call(layer, device), every_call(doubled, device), 2e-6)


class Int8Linear(nn.Module):
    """A projection of weights in eight bits, as a quantiser puts it in place of another: no ``weight``, no ``bias``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("offset", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed * self.scale, self.offset)


def test_quantised_projections(package, device) -> None:
    """A layer with projections of another class is the layer with the weights that those stand for."""
    layer = make_layer(package).to(device)
    expected = copy.deepcopy(layer)
    for name in ("input_projection", "output_projection"):
        quantised = Int8Linear(getattr(layer, name))
        setattr(layer, name, quantised)
        with torch.no_grad():
            getattr(expected, name).weight.copy_(quantised.packed * quantised.scale)
    assert_close(every_call(layer, device), every_call(expected, device), 2e-6)


@pytest.mark.parametrize("padding", [0, 3])
def test_a_convolution_of_torch(package, device, padding) -> None:
    """torch's own convolution does for the layer's, whether or not it pads both ends as that of a published model."""
    layer = make_layer(package).to(device)
    expected = every_call(layer, device)
    channels = layer.conv1d.in_channels
    plain = nn.Conv1d(channels, channels, 4, groups=channels, padding=padding, device=device)
    plain.load_state_dict(layer.conv1d.state_dict())
    layer.conv1d = plain
    assert_close(every_call(layer, device), expected, 2e-6)
