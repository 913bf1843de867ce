"""The layer's parameters: which stay in float32, how they are drawn, and how optimisers group them."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import assert_same
from layer import GATED, HIDDEN, PLAIN, in_pieces, layered
from torch import nn
from torch.nn.utils import parametrize, prune

DECAY = ("decay_gate.A_log", "decay_gate.dt_bias")
UNDECAYED = {*DECAY, "D", "g_norm.weight", "input_projection.bias", "conv1d.bias"}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the package that serves the layers of these tests."""
    return layered(tmp_path_factory.mktemp("parameters"))


def made(package: ModuleType, **options: Any) -> nn.Module:
    """Return a layer with every parameter that a layer may have."""
    torch.manual_seed(0)
    layer: nn.Module = package.M2RNN(HIDDEN, **{**GATED, "bias": True, **options})
    return layer


def dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of each parameter by the last two parts of its name."""
    return {name.removeprefix("0."): parameter.dtype for name, parameter in module.named_parameters()}


def assert_kept(module: nn.Module, dtype: torch.dtype, wide: torch.dtype = torch.float32) -> None:
    """Fail unless the decay parameters are ``wide`` and all others ``dtype``."""
    found = dtypes(module)
    assert found == {name: wide if name in DECAY else dtype for name in found}


MOVES: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "bfloat16": (lambda module: module.bfloat16(), torch.bfloat16),
    "half": (lambda module: module.half(), torch.float16),
    "to a dtype": (lambda module: module.to(torch.bfloat16), torch.bfloat16),
    "to a device and a dtype": (lambda module: module.to("cpu", torch.bfloat16), torch.bfloat16),
    "to a tensor": (lambda module: module.to(torch.ones(1).half()), torch.float16),
    "type": (lambda module: module.type(torch.bfloat16), torch.bfloat16),
    "in a model": (lambda module: nn.Sequential(module).bfloat16(), torch.bfloat16),
    "twice": (lambda module: module.bfloat16().half(), torch.float16),
    "there and back": (lambda module: module.bfloat16().float(), torch.float32),
}


@pytest.mark.parametrize("name", MOVES)
def test_decay_parameters_keep_their_bits(package, name) -> None:
    """Casts of the layer or of a model around it leave A_log and dt_bias in float32, and gradients too."""
    layer = made(package)
    before = {key: layer.get_parameter(key).detach().clone() for key in DECAY}
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    move, dtype = MOVES[name]
    moved = move(layer)
    assert_kept(moved, dtype)
    assert_same({key: layer.get_parameter(key).detach() for key in DECAY}, before)
    assert all(
        parameter.grad is not None and parameter.grad.dtype == parameter.dtype for parameter in moved.parameters()
    )


def test_float64_is_wider(package) -> None:
    """A float64 layer has float64 decay parameters, and a cast from there to bfloat16 ends at float32."""
    layer = made(package).double()
    assert_kept(layer, torch.float64, torch.float64)
    assert_kept(layer.bfloat16(), torch.bfloat16)


def test_layers_made_in_bfloat16(package) -> None:
    """Decay parameters are float32 whether the layer's dtype is given, torch's default, or made on the meta device."""
    assert_kept(made(package, dtype=torch.bfloat16), torch.bfloat16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_kept(made(package), torch.bfloat16)
    finally:
        torch.set_default_dtype(before)
    assert_kept(made(package, device="meta", dtype=torch.bfloat16).to_empty(device="cpu"), torch.bfloat16)
    assert_kept(made(package, device="meta").bfloat16(), torch.bfloat16)


def test_state_dicts_are_the_parameters_and_no_more(package, tmp_path: Path) -> None:
    """Their tensors are the parameters' memory, to the end of what they say: safetensors' functions take the layer."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    layer, other = made(package), made(package).requires_grad_(False)
    held = layer.state_dict()
    for name, x in layer.named_parameters():
        assert held[name].data_ptr() == x.data_ptr(), name
        assert held[name].untyped_storage().nbytes() == x.numel() * x.element_size(), name
    held["input_projection.weight"].fill_(3.0)
    assert layer.input_projection.weight.eq(3.0).all()
    assert all(x is layer.get_parameter(name) for name, x in layer.state_dict(keep_vars=True).items())
    for module, place in ((layer, "layer"), (nn.Sequential(layer), "model")):
        safetensors.save_model(module, str(tmp_path / place))
    safetensors.load_model(other, str(tmp_path / "layer"))
    assert_same(dict(other.state_dict()), dict(layer.state_dict()))
    assert made(package, device="meta").state_dict()["input_projection.weight"].is_meta


@pytest.mark.parametrize("assign", [False, True])
def test_saved_and_loaded(package, tmp_path: Path, assign) -> None:
    """A bf16 layer's file has float32 decay parameters, and a file that has none is read into float32."""
    layer = made(package).bfloat16()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    saved = torch.load(tmp_path / "layer.pt", weights_only=True)
    assert {name: x.dtype for name, x in saved.items()} == dtypes(layer)
    other = made(package, dtype=torch.bfloat16)
    other.load_state_dict(saved, assign=assign)
    assert_same(dict(other.state_dict()), dict(layer.state_dict()))
    rounded = {name: x.bfloat16() for name, x in saved.items()}
    other.load_state_dict(rounded, assign=assign)
    assert_kept(other, torch.bfloat16)
    assert all(x.dtype == torch.bfloat16 for x in rounded.values())
    assert_same({key: other.get_parameter(key).detach() for key in DECAY}, {key: rounded[key].float() for key in DECAY})


def test_loading_leaves_parameters_where_they_were_put(package) -> None:
    """Optimisers may have them in memory of their own, which they send to other ranks (ZeRO, as views of buckets)."""
    layer, saved = made(package), made(package).state_dict()
    bucket = torch.zeros(layer.input_projection.weight.numel())
    layer.input_projection.weight.data = bucket.view_as(layer.input_projection.weight)
    layer.load_state_dict(saved)
    assert layer.input_projection.weight.data_ptr() == bucket.data_ptr()
    assert_same(dict(layer.state_dict()), dict(saved))


def test_a_bf16_layer_is_trained(package, device) -> None:
    """Its decay parameters have float32 gradients and take steps that bfloat16 would lose."""
    layer = made(package).to(device, torch.bfloat16)
    layer(torch.ones(1, 3, HIDDEN, device=device, dtype=torch.bfloat16)).float().square().sum().backward()
    for key in DECAY:
        parameter = layer.get_parameter(key)
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.norm() > 0


@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_a_rounded_gate(package, device, backend) -> None:
    """Every call has the bits of a layer whose gate is rounded by a hook; without the option they are others."""
    torch.manual_seed(0)
    options = {"backend": backend, "fused": False}  # a hook keeps kernels of the layer's own away
    layers = [package.M2RNN(HIDDEN, **PLAIN, round_gate=rounds, **options) for rounds in (True, False, False)]
    rounded, hooked, exact = (layer.to(device, torch.bfloat16) for layer in layers)
    for other in (hooked, exact):
        other.load_state_dict(rounded.state_dict())
    if backend == "reference":  # which takes what the gate is computed of
        hooked.decay_gate.forward = lambda x, in_kernel=False: (rounded.decay_gate(x).bfloat16(), None, None)
    else:
        hooked.decay_gate.register_forward_hook(lambda gate, given, f: f.bfloat16())
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    with torch.no_grad():
        y, expected, other = (layer(x) for layer in (rounded, hooked, exact))
        steps = [in_pieces(layer, x, layer.allocate_cache(2)) for layer in (rounded, hooked)]
    assert torch.equal(y, expected)
    assert torch.equal(*steps)
    assert not torch.equal(y, other)


def test_a_rounded_gate_needs_a_variant_that_is_given_it(package, device) -> None:
    """Kernels that compute the gate round nothing, and the error says what to build."""
    layer = made(package, round_gate=True).to(device, torch.bfloat16)
    with pytest.raises(package.VariantNotBuiltError, match="gate: given"):
        layer(torch.ones(1, 2, HIDDEN, device=device, dtype=torch.bfloat16))


def initialisation(package: ModuleType, *arguments: Any, **named: Any) -> Any:
    """Return an ``Initialisation`` of the package."""
    return importlib.import_module(f"{package.__name__}.init").Initialisation(*arguments, **named)


def spread(x: torch.Tensor) -> float:
    """Return the standard deviation about 0."""
    return x.detach().double().square().mean().sqrt().item()


@pytest.mark.parametrize("layers", [None, 8])
@pytest.mark.parametrize("method", ["fan_in", "normal"])
def test_initialisation(package, method, layers) -> None:
    """Weights have the published standard deviations, the output projection's scaled by depth where that is given."""
    torch.manual_seed(1)
    init = initialisation(package, method, 0.02, layers)
    layer = package.M2RNN(512, **PLAIN, init=init, bias=True, conv_width=4)
    expected = {"input_projection": 512**-0.5, "conv1d": 0.5, "output_projection": 32**-0.5}
    for name, scale in expected.items():
        scale = 0.02 if method == "normal" else scale
        if name == "output_projection" and layers:
            scale /= math.sqrt(2 * layers)
        weight = getattr(layer, name).weight
        assert spread(weight) == pytest.approx(scale, rel=5 / math.sqrt(2 * weight.numel()))
    assert not layer.input_projection.bias.any()
    assert not layer.conv1d.bias.any()
    assert torch.equal(layer.state_weight, torch.eye(16).expand(2, 16, 16))


def test_ranges_of_decay_parameters(package) -> None:
    """A and dt are drawn from the ranges that are given, dt from its floor on."""
    init = initialisation(package, A_range=(2.0, 3.0), dt_range=(1e-4, 1e-2), dt_floor=1e-3)
    heads = {"q": 1, "k": 1, "v": 2, "f": 2, "w": 2}
    layers = [package.M2RNN(8, 16, 16, heads, init=init).decay_gate for _ in range(200)]
    A = torch.cat([gate.A_log.detach() for gate in layers]).exp()
    dt = nn.functional.softplus(torch.cat([gate.dt_bias.detach() for gate in layers]))
    assert 2 - 1e-5 <= A.min() < 2.1
    assert 2.9 < A.max() < 3 + 1e-5
    assert dt.min().item() == pytest.approx(1e-3, rel=1e-3)
    assert 0.3 < (dt < 1.001e-3).float().mean() < 0.7
    assert 0.009 < dt.max() < 0.01 * (1 + 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mup"}, "init.method must be fan_in or normal, got 'mup'"),
        ({"layers": 0}, "init.layers must be at least 1 or None, got 0"),
        ({"A_range": (2.0, 1.0)}, r"init.A_range must be two numbers from 0 on, in order, got \(2.0, 1.0\)"),
        ({"dt_range": (0.0, 1.0)}, r"init.dt_range must be two numbers above 0, in order, got \(0.0, 1.0\)"),
    ],
)
def test_distributions_that_cannot_be(package, options, message) -> None:
    """What nothing can be drawn from is named."""
    with pytest.raises(ValueError, match=f"^M2RNN: {message}$"):
        initialisation(package, **options)


def marked(layer: nn.Module) -> set[str]:
    """Return the names of parameters that are marked for no weight decay."""
    return {name for name, parameter in layer.named_parameters() if getattr(parameter, "_no_weight_decay", False)}


def test_marks_for_no_weight_decay(package) -> None:
    """Decay parameters, D, norms and biases are marked, also after a cast, loading, and for parameters made real."""
    assert marked(made(package)) == UNDECAYED
    assert marked(made(package).bfloat16()) == UNDECAYED
    assert marked(nn.Sequential(made(package, device="meta")).to_empty(device="cpu")[0]) == UNDECAYED
    loaded = made(package)
    loaded.load_state_dict({name: x.clone() for name, x in loaded.state_dict().items()}, assign=True)
    assert marked(loaded) == marked(copy.deepcopy(loaded)) == UNDECAYED
    bare = package.M2RNN(HIDDEN, **PLAIN, norm="layernorm", residual=False, conv_width=None)
    assert marked(bare) == {*DECAY, "g_norm.weight", "g_norm.bias"}


class Model(nn.Module):
    """A model around a layer, with a head that shares the embedding's weight."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.mixer = layer
        self.head = nn.Linear(HIDDEN, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.scale._no_weight_decay = True  # type: ignore[attr-defined]


class TheirRMSNorm(nn.Module):
    """A norm as models define their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


def test_biases_and_norms_of_other_modules(package) -> None:
    """Whatever torch calls a bias, and every norm of it or of a model's own, is not decayed."""
    model = nn.ModuleDict({
        "attention": nn.MultiheadAttention(8, 2, add_bias_kv=True), "groups": nn.GroupNorm(2, 8),
        "batch": nn.BatchNorm1d(8), "lstm": nn.LSTM(4, 4), "own": TheirRMSNorm(),
    })  # fmt: skip
    groups = importlib.import_module(f"{package.__name__}.optimizer").parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(x)] for group in groups if group["weight_decay"] for x in group["params"]}
    assert decayed == {
        "attention.in_proj_weight", "attention.out_proj.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0",
    }  # fmt: skip


class Flat(nn.Module):
    """A layer whose parameters a wrapper has flattened, as FSDP does with those of a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.state_weight = nn.Parameter(torch.ones(12))
        self.projection = nn.Linear(3, 4, bias=False)
        self.projection.weight = nn.Parameter(torch.ones(12))


def test_what_is_no_matrix_any_more_is_for_no_optimiser_of_matrices(package) -> None:
    """A flattened weight has no rows to orthogonalise, whatever its name is."""
    (group,) = importlib.import_module(f"{package.__name__}.optimizer").parameter_groups(Flat(), 0.1)
    assert (group["name"], len(group["params"]), group["weight_decay"]) == ("others", 2, 0.1)


@pytest.mark.parametrize("marks", [True, False])
def test_groups_of_an_optimiser(package, marks) -> None:
    """Every parameter is in one group, with or without marks on the layer's, and an optimiser takes the groups."""
    model = Model(made(package))
    if not marks:
        for parameter in model.mixer.parameters():
            parameter.__dict__.pop("_no_weight_decay", None)
    groups = importlib.import_module(f"{package.__name__}.optimizer").parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}
    assert found == {
        "matrices": {"mixer.input_projection.weight", "mixer.output_projection.weight"},
        "state_weights": {"mixer.state_weight"},
        "others": {"embedding.weight", "mixer.conv1d.weight"},
        "undecayed": {"scale", "norm.weight", "norm.bias", *(f"mixer.{name}" for name in UNDECAYED)},
    }
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "matrices": 0.1, "state_weights": 0.1, "others": 0.1, "undecayed": 0.0
    }  # fmt: skip
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert len(torch.optim.AdamW(groups, lr=1e-3).param_groups) == 4
    matrices = next(group for group in groups if group["name"] == "matrices")
    torch.optim.Muon(matrices["params"], lr=1e-3, weight_decay=matrices["weight_decay"])


def identity(module: nn.Module, name: str) -> None:
    """Put a parametrization in front of a parameter that leaves it as it is."""
    parametrize.register_parametrization(module, name, nn.Identity())


@pytest.mark.parametrize("hide", [identity, prune.identity])
def test_groups_of_hidden_parameters(package, hide) -> None:
    """A parameter behind a parametrization or a mask is in its group, also where it has no mark, as in a copy."""
    layer = made(package)
    plain = {name for name, _ in layer.named_parameters()}
    for path in plain:
        module, _, name = path.rpartition(".")
        hide(layer.get_submodule(module), name)
    for parameter in layer.parameters():
        parameter.__dict__.pop("_no_weight_decay", None)
    groups = importlib.import_module(f"{package.__name__}.optimizer").parameter_groups(layer, 0.1)
    names = {
        id(parameter): name.replace("parametrizations.", "").removesuffix(".original").removesuffix("_orig")
        for name, parameter in layer.named_parameters()
    }
    assert {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups} == {
        "matrices": {"input_projection.weight", "output_projection.weight"},
        "state_weights": {"state_weight"},
        "others": {"conv1d.weight"},
        "undecayed": UNDECAYED,
    }
