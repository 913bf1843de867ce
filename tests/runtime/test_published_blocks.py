"""Layers of published configurations against what the published block computes: ``data/lm_engine``, run on a CPU."""

from __future__ import annotations

import json
import re
import sys
from itertools import accumulate, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support import SCHEDULES, build_package, import_package, make_variant
from torch import Tensor, nn

DATA = Path(__file__).parent / "data" / "lm_engine"
INDEX: dict[str, Any] = json.loads((DATA / "index.json").read_text(encoding="utf-8"))
BLOCKS = [name for name, facts in INDEX["files"].items() if facts["dtype"] == "float64" and name != "padded.npz"]
HEADS = [(1, 1, 4, 4, 4), (2, 2, 4, 4, 4), (1, 1, 2, 4, 4), (1, 1, 4, 4, 1)]
"""Heads of q, k, v, f and w of the files' layers; every gate is its own, also where all are of one projected value."""
TOLERANCE = {torch.float64: (1e-13, 2e-7), torch.float32: (1e-6, 5e-6)}
"""Largest difference over the largest magnitude, of results and of gradients, which the files have in float32. In
float32 the published code itself is off by up to 3.2e-7 and 2e-6."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return a package that clips the whole gradient, as the published path of a CPU does."""
    variants = [make_variant(heads=heads, clip="total") for heads in HEADS]
    files = build_package("published_blocks", variants, SCHEDULES["two_level_partial"])
    return import_package(tmp_path_factory.mktemp("blocks") / "published_blocks", files)


def arrays(name: str) -> dict[str, Tensor]:
    """Return the arrays of a file."""
    with np.load(DATA / name) as found:
        return {key: torch.from_numpy(found[key]) for key in found.files}


def off(given: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest magnitude."""
    return ((given.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def load(package: ModuleType, name: str, device: torch.device, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return the layer of a file, with its parameters loaded, and all that the file has."""
    facts, found = INDEX["files"][name], {key: x.to(device) for key, x in arrays(name).items()}
    layer = package.M2RNN.from_config(facts["config"], facts["hidden_size"], device=device, **options)
    layer.load_state_dict({key: found[key] for key in facts["state_dict"]}, strict=True)
    return layer, found


RUNS = [(torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "kernels")]


@pytest.mark.parametrize(("dtype", "backend"), RUNS, ids=["fp64", "fp32", "kernels"])
@pytest.mark.parametrize("name", BLOCKS)
def test_results_gradients_and_decoding(package, device, name, dtype, backend) -> None:
    """Everything that the published block gives for the same parameters, within ``TOLERANCE``."""
    layer, found = load(package, name, device, backend=backend, dtype=dtype)
    allowed, allowed_gradients = TOLERANCE[dtype]
    x = found["x"].to(dtype).requires_grad_()
    y = layer(x)
    assert off(y, found["y"]) < allowed
    names = [key for key, _ in layer.named_parameters()]
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], found["dy"].to(dtype))
    errors = {key: off(g, found[f"grad.{key}"]) for key, g in zip(["x", *names], gradients, strict=True)}
    assert {key: error for key, error in errors.items() if not error < allowed_gradients} == {}
    cache, pieces, ends = layer.allocate_cache(2), [], [0, *accumulate(INDEX["files"][name]["decode"])]
    with torch.no_grad():
        for start, end in pairwise(ends):
            pieces.append(layer(x[:, start:end], cache))
    assert off(torch.cat(pieces, 1), found["y_decode"]) < allowed
    assert off(cache.state, found["recurrent_state"]) < allowed
    if "conv_state" in found:
        assert off(cache.conv.mT, found["conv_state"]) < allowed
    else:
        assert cache.conv.shape[1] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_a_padded_batch_is_its_rows_alone(package, device, dtype) -> None:
    """What the published block gives of each row's tokens alone, and the states after them, which its mask does not."""
    layer, found = load(package, "padded.npz", device, backend="reference", dtype=dtype)
    cache, allowed = layer.allocate_cache(2), TOLERANCE[dtype][0]
    with torch.no_grad():
        y = layer(found["x"].to(dtype), cache, attention_mask=found["attention_mask"])
    assert off(y, found["y_alone"]) < allowed
    assert off(cache.state, found["recurrent_state"]) < allowed
    assert off(cache.conv.mT, found["conv_state"]) < allowed


@pytest.mark.parametrize("rounded", [True, False])
def test_gates_in_bfloat16(package, device, rounded, monkeypatch) -> None:
    """The operator gets the gate rounded as the published block rounds it, or in float32; y is off by bf16's rounding.

    The projection of x is rounded to bfloat16 before the gate, which another order of sums may round to a neighbour.
    """
    layer, found = load(package, "published_bf16.npz", device, backend="reference", dtype=torch.bfloat16)
    layer.round_gate = rounded
    scan = sys.modules[f"{package.__name__}.scan"]
    call, gates = scan.m2rnn, list[Tensor]()

    def spy(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, forget: Tensor, *rest: Any, **named: Any) -> Any:
        gates.append(forget if rounded else layer.decay_gate(forget))
        return call(q, k, v, weight, forget, *rest, **named)

    monkeypatch.setattr(scan, "m2rnn", spy)
    y = layer(found["x"].bfloat16())
    expected = found["f"] if rounded else found["f_unrounded"]
    assert gates[0].dtype == (torch.bfloat16 if rounded else torch.float32)
    same = (gates[0].float() - expected).abs() <= (0 if rounded else 1e-6)
    assert same.float().mean() > 0.95
    assert off(gates[0], expected) < 2**-7
    assert 1 in found["f"]
    assert 1 not in found["f_unrounded"]
    assert off(y, found["y_float64"]) < 0.02


REFUSED = {
    "normalization p_norm": "normalization_function must be null or one of rmsnorm, layernorm, got 'p_norm'",
    "f heads 2 of 4": "num_f_heads must be 1 or 4, as A_log and dt_bias have 4 entries, got 2",
    "v heads 2 of 4 with residual": "num_v_heads must be 1 or 4 with use_residual, as D has 4 rows, got 2",
    "g heads 2 of 4": "num_g_heads must be 4, as the normalised result has that many heads, got 2",
    "g heads 1": "num_g_heads must be 4, as the normalised result has that many heads, got 1",
    "kernel size 1": "kernel_size must be null or an integer of at least 2, got 1",
    "kernel null with an activation": "activation_function must be null where kernel_size is null, got 'silu'",
    "activation swiglu": "activation_function must be null or one of identity, celu",
}
"""Configurations that the published code cannot run, and what is said of them."""
RUN = {"padded batch with attention_mask and a cache", "weight heads 1", "weight heads 2", "padding-free"}
RUN |= {"padding-free without a convolution"}
"""Those of them that run here: nothing in them is without a meaning."""


def test_every_failed_configuration_is_accounted_for() -> None:
    """What the published code cannot run is an error here, or runs."""
    assert {failed["what"] for failed in INDEX["failed"]} == {*REFUSED, *RUN}


@pytest.mark.parametrize("failed", INDEX["failed"], ids=lambda failed: failed["what"])
def test_what_the_published_code_cannot_run(package, failed) -> None:
    """The error names the key, or the layer runs a packed batch."""
    if failed["what"] in REFUSED:
        with pytest.raises(ValueError, match=f"^M2RNN: {re.escape(REFUSED[failed['what']])}"):
            package.M2RNN.from_config(failed["config"], 32, backend="reference")
        return
    layer = package.M2RNN.from_config(failed["config"], 32, backend="reference", dtype=torch.float64)
    x = torch.ones(5, 32, dtype=torch.float64)
    y = layer(x, cu_seqlens=torch.tensor([0, 2, 5]))
    assert off(y[2:4], layer(x[None, :2])[0]) < 1e-13


PUBLISHED: dict[str, Any] = INDEX["files"]["published.npz"]["config"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k_head_dim": "16"}, "k_head_dim must be an integer of at least 1, got '16'"),
        ({"v_head_dim": 0}, "v_head_dim must be an integer of at least 1, got 0"),
        ({"num_weight_heads": 3}, "num_weight_heads must divide 4, the most of any, got 3"),
        ({"num_weight_heads": True}, "num_weight_heads must be an integer of at least 1, got True"),
        ({"num_k_heads": 3}, "num_k_heads must divide 4, the most of any, got 3"),
        ({"use_residual": 1}, "use_residual must be true or false, got 1"),
        ({"add_bias": None}, "add_bias must be true or false, got None"),
        ({"gradient_clipping": "1"}, "gradient_clipping must be a number, got '1'"),
        ({"A_init_min": -1}, "A_init_min must be at least 0, got -1"),
        ({"A_init_max": None}, "A_init_max must be a number, got None"),
        ({"dt_init_min": 0}, "dt_init_min must be above 0, got 0"),
        ({"dt_init_max": 1e-9}, "dt_init_max must be at least dt_init_min, 0.001, got 1e-09"),
        ({"dt_init_floor": "x"}, "dt_init_floor must be a number, got 'x'"),
        ({"sequence_mixer_type": "rnn"}, "sequence_mixer_type must be m2rnn, got 'rnn'"),
        ({"activation_function": "prelu"}, "activation_function must be null or one of"),
        ({"window": 4}, "window is no key of a published block; those are k_head_dim, v_head_dim"),
    ],
)
def test_errors_name_the_key(package, changed, message) -> None:
    """Whatever is wrong with a configuration is said by the published key."""
    with pytest.raises(ValueError, match=f"^M2RNN: {re.escape(message)}"):
        package.M2RNN.from_config({**PUBLISHED, **changed}, 32, backend="reference")


@pytest.mark.parametrize("key", [key for key in PUBLISHED if "init" not in key and key != "sequence_mixer_type"])
def test_a_key_that_is_missing(package, key) -> None:
    """Every key without a default must be there; the others may be left out."""
    block = {name: value for name, value in PUBLISHED.items() if name != key}
    with pytest.raises(ValueError, match=f"^M2RNN: {key} must be given"):
        package.M2RNN.from_config(block, 32)
    short = {name: value for name, value in PUBLISHED.items() if "init" not in name and name != "sequence_mixer_type"}
    assert package.M2RNN.from_config(short, 32).init == package.M2RNN.from_config(PUBLISHED, 32).init


def test_dims_that_were_not_built(package) -> None:
    """The error has the spec lines, with a gate for each head of the state whatever num_f_heads is."""
    with pytest.raises(package.VariantNotBuiltError, match=r"heads: \{q: 1, k: 1, v: 6, f: 6, w: 6\}"):
        package.M2RNN.from_config({**PUBLISHED, **_six_heads(), "num_f_heads": 1}, 32)


def _six_heads() -> dict[str, int]:
    return dict.fromkeys(("num_v_heads", "num_g_heads", "num_weight_heads"), 6)


def test_options_go_before_the_block(package) -> None:
    """Options of the constructor are taken, and of the initialisation all but what the block says."""
    init = sys.modules[f"{package.__name__}.init"].Initialisation("normal", 0.02, layers=8, A_range=(1.0, 2.0))
    layer = package.M2RNN.from_config(
        {**PUBLISHED, "A_init_max": 4.0}, 32, clip=None, norm_eps=1e-3, init=init, round_gate=True, dtype=torch.float64
    )
    assert (layer.clip, layer.g_norm.eps, layer.round_gate) == (None, 1e-3, True)
    assert (layer.init.method, layer.init.layers, layer.init.A_range) == ("normal", 8, (0.0, 4.0))
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


ACTIVATIONS = {
    "silu": nn.SiLU(), "swish": nn.SiLU(), "relu": nn.ReLU(), "gelu": nn.GELU(), "mish": nn.Mish(), "elu": nn.ELU(),
    "gelu_pytorch_tanh": nn.GELU(approximate="tanh"), "celu": nn.CELU(), "selu": nn.SELU(), "relu6": nn.ReLU6(),
    "hard_sigmoid": nn.Hardsigmoid(), "hard_swish": nn.Hardswish(), "hard_tanh": nn.Hardtanh(), "tanh": nn.Tanh(),
    "leaky_reLU": nn.LeakyReLU(), "log_sigmoid": nn.LogSigmoid(), "sigmoid": nn.Sigmoid(), "softplus": nn.Softplus(),
    "soft_plus": nn.Softplus(), "identity": nn.Identity(), "relu2": None, "relu_squared": None,
}  # fmt: skip
"""Activations by their published names, as torch's modules; None for the square of a ReLU, of which torch has none."""


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_name(package, name) -> None:
    """A layer has the activation that its configuration names, and compiles into one graph."""
    torch.manual_seed(0)
    made = {"backend": "reference", "dtype": torch.float64}
    layer = package.M2RNN.from_config({**PUBLISHED, "activation_function": name}, 32, **made)
    function = ACTIVATIONS[name] or (lambda x: nn.functional.relu(x) ** 2)
    plain = package.M2RNN.from_config({**PUBLISHED, "activation_function": None}, 32, **made)
    plain.load_state_dict(layer.state_dict())
    conv, plain.conv1d = plain.conv1d, nn.Module()
    plain.conv1d.forward = lambda x: function(conv(x))
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    assert off(layer(x), plain(x)) < 1e-13
    torch.compiler.reset()  # one function, and another graph for each name
    assert off(torch.compile(layer, fullgraph=True, backend="eager")(x), plain(x)) < 1e-13


def test_every_activation_is_tested(package) -> None:
    """The table of activations has nothing that the test above does not know."""
    assert {*sys.modules[f"{package.__name__}.activations"].ACTIVATIONS, "identity"} == set(ACTIVATIONS)
