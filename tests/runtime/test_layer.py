"""The layer of a generated package: against itself in float64, and whatever may be done with it in a model."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import assert_close, assert_same, distance, module_of, offsets_of
from layer import (
    GATED,
    GROUPED,
    HIDDEN,
    PLAIN,
    SHAPES,
    assert_within,
    budgets,
    by_hand,
    in_pieces,
    layered,
    loss_weights,
    make_layer,
    tokens,
    twin,
    with_gradients,
)
from support import make_variant
from torch import Tensor, nn

LENGTHS = (5, 0, 1, 3)
"""Lengths of packed sequences: longer than the convolution, empty, and shorter."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the package that serves the layers of these tests."""
    return layered(tmp_path_factory.mktemp("layer"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_every_gradient_against_float64(package, device, shape, dtype) -> None:
    """The output, and the gradients of the input and of all parameters, are within what the dtype leaves them."""
    layer = make_layer(package, shape).to(device, dtype)
    x = tokens(device, 2, 6).to(dtype)
    exact = with_gradients(twin(layer, torch.float64), x.double())
    allowed = budgets(exact, twin(layer, dtype), x, dtype)
    given = with_gradients(layer, x)
    kept = dict.fromkeys(("decay_gate.A_log", "decay_gate.dt_bias"), torch.float32)
    assert {name: x.dtype for name, x in given.items()} == {**dict.fromkeys(exact, dtype), **kept}
    assert_within(given, exact, allowed)
    assert all(x.norm() > 0 for x in exact.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_layer_is_the_papers(package, shape) -> None:
    """The layer in float64 agrees with its definition written out again, head by head and token by token."""
    layer = twin(make_layer(package, shape), torch.float64)
    x = tokens(torch.device("cpu"), 6).double()
    assert distance(layer(x[None])[0], by_hand(layer, x)) < 1e-13


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_and_decoding_equal_the_full_call(package, device, shape) -> None:
    """Whatever a sequence is cut into, results and states are those of one call, and stay in place."""
    layer, x = make_layer(package, shape).to(device), tokens(device, 2, 9)
    with torch.no_grad():
        full = layer(x)
        whole = layer.allocate_cache(2)
        layer(x, whole)
        cache = layer.allocate_cache(2)
        places = cache.conv.data_ptr(), cache.state.data_ptr()
        pieces = [layer(x[:, a:b], cache) for a, b in pairwise((0, 2, 6, 7, 8, 9))]
    assert_close({"y": torch.cat(pieces, 1)}, {"y": full}, 2e-6)
    assert_close({"conv": cache.conv, "state": cache.state}, {"conv": whole.conv, "state": whole.state}, 2e-6)
    assert places == (cache.conv.data_ptr(), cache.state.data_ptr())
    cache.reset()
    with torch.no_grad():
        assert_close({"y": layer(x[:, :1], cache)}, {"y": full[:, :1]}, 2e-6)


def test_decoding_goes_on_from_a_packed_prompt(package, device) -> None:
    """Prompts of several lengths, packed or padded, leave a cache from which each sequence goes on."""
    layer, x = make_layer(package, "softplus").to(device), tokens(device, 4, 6)
    mask = torch.arange(6, device=device) < torch.tensor(LENGTHS, device=device)[:, None]
    flat, offsets = x[mask], offsets_of(LENGTHS).to(device)
    packed, padded = layer.allocate_cache(4), layer.allocate_cache(4)
    with torch.no_grad():
        layer(flat, packed, cu_seqlens=offsets)
        layer(x, padded, attention_mask=mask)
        assert_same({"conv": padded.conv, "state": padded.state}, {"conv": packed.conv, "state": packed.state})
        following = layer(x[:, 5:], packed)
        for i, length in enumerate(LENGTHS):
            alone = layer(torch.cat((x[i : i + 1, :length], x[i : i + 1, 5:]), 1))
            assert distance(following[i], alone[0, -1:]) < 2e-6, i


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_batch_is_its_sequences_one_by_one(package, device, shape) -> None:
    """No sequence sees its neighbour, in the convolution or in the state; gradients of the input neither."""
    layer, x = make_layer(package, shape).to(device), tokens(device, sum(LENGTHS))
    offsets = offsets_of(LENGTHS).to(device)
    together = with_gradients(layer, x, cu_seqlens=offsets)
    weights = loss_weights(together["y"])
    for start, end in pairwise(offsets.tolist()):
        if start == end:
            continue
        leaf = x[None, start:end].detach().requires_grad_()
        y = layer(leaf)
        (dx,) = torch.autograd.grad(y, leaf, weights[None, start:end])
        assert_close(
            {"y": y[0], "x": dx[0]}, {"y": together["y"][start:end], "x": together["x"][start:end]}, 2e-6
        )  # fmt: skip


MASKS = {
    "right": ([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], torch.bool),
    "left": ([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], torch.int64),
    "holes": ([[1, 0, 1, 0, 1], [1, 1, 0, 1, 1], [0, 1, 1, 0, 0]], torch.float32),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_padded_batch_is_its_sequences_one_by_one(package, device, name) -> None:
    """Masked tokens have no effect on others, and their outputs are 0."""
    layer, x = make_layer(package).to(device), tokens(device, 3, 5)
    rows, dtype = MASKS[name]
    mask = torch.tensor(rows, device=device).bool()
    with torch.no_grad():
        spoilt = x.masked_fill(~mask[..., None], math.nan)
        y = layer(spoilt, attention_mask=mask.to(dtype))
        assert bool((y[~mask] == 0).all())
        for i in range(3):
            if mask[i].any():
                assert distance(y[i][mask[i]], layer(x[i][mask[i]][None])[0]) < 2e-6


@pytest.mark.parametrize(("shape", "name"), [("given", "right"), ("given", "left"), ("softplus", "holes")])
def test_gradients_of_a_padded_batch_are_its_sequences_one_by_one(package, device, shape, name) -> None:
    """Each token's gradient is its own sequence's, others have none, and parameters have the sum of the sequences'."""
    layer, x = make_layer(package, shape).to(device), tokens(device, 3, 5)
    rows, dtype = MASKS[name]
    mask = torch.tensor(rows, device=device).bool()
    spoilt = x.masked_fill(~mask[..., None], math.nan)
    together = with_gradients(layer, spoilt, attention_mask=mask.to(dtype))
    weights = loss_weights(together["y"])
    expected = {key: torch.zeros_like(value) for key, value in together.items()}
    for i, present in enumerate(mask):
        if present.any():
            leaf = x[i, present][None].requires_grad_()
            y = layer(leaf)
            dx, *gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], weights[i, present][None])
            expected["y"][i, present], expected["x"][i, present] = y[0].detach(), dx[0]
            for (key, _), gradient in zip(layer.named_parameters(), gradients, strict=True):
                expected[key] += gradient
    assert bool((together["x"][~mask] == 0).all())
    assert_close(together, expected, 2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_with_a_mask(package, device, shape) -> None:
    """On both backends a row without a token gives 0 and keeps its cache's bits; others go on as without a mask."""
    mask = torch.tensor([[1], [0], [1]], device=device)
    present, x = mask[:, 0].bool(), tokens(device, 3, 4)
    token = x[:, 3:].masked_fill(~present[:, None, None], math.nan)
    results = {}
    for backend in ("kernels", "reference"):
        layer = make_layer(package, shape, backend=backend).to(device)
        cache, whole = layer.allocate_cache(3), layer.allocate_cache(3)
        with torch.no_grad():
            layer(x[:, :3], cache)
            before = {"conv": cache.conv[~present].clone(), "state": cache.state[~present].clone()}
            y = layer(token, cache, attention_mask=mask)
            full = layer(x, whole)[:, 3:]
        assert bool((y[~present] == 0).all())
        assert_same({"conv": cache.conv[~present], "state": cache.state[~present]}, before)
        results[backend] = {"y": y, "conv": cache.conv, "state": cache.state}
        moved = {key: value[present] for key, value in results[backend].items()}
        assert_close(moved, {"y": full[present], "conv": whole.conv[present], "state": whole.state[present]}, 2e-6)
    assert_close(results["kernels"], results["reference"], 2e-6)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_mask_of_another_shape_is_refused_with_a_cache(package, device, steps) -> None:
    """A step looks at its mask as other calls do, and moves nothing on before that."""
    layer, x = make_layer(package).to(device), tokens(device, 2, steps)
    cache = layer.allocate_cache(2)
    message = re.escape(f"attention_mask must be (2, {steps}), got (1, {steps})")
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        layer(x, cache, attention_mask=torch.ones(1, steps, device=device))
    assert not cache.state.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_kept_in_bf16(package, device, shape) -> None:
    """A call rounds the state that it leaves, to the bit, and y is off by what these roundings make in float64."""
    layer, x = make_layer(package, shape).to(device), tokens(device, 2, 8)
    with pytest.raises(
        TypeError, match=r"^M2RNN: state_dtype must be torch.float32 or torch.bfloat16, got torch.float16$"
    ):
        layer.allocate_cache(2, state_dtype=torch.float16)
    caches = [layer.allocate_cache(2, state_dtype=dtype) for dtype in (torch.bfloat16, torch.float32, None)]
    narrow, rounded, wide = caches
    assert [cache.state.dtype for cache in caches] == [torch.bfloat16, torch.float32, torch.float32]
    assert {cache.conv.dtype for cache in caches} == {torch.float32}
    y = in_pieces(layer, x, narrow)
    assert_same({"y": y, "conv": narrow.conv}, {"y": in_pieces(layer, x, rounded, rounds=True), "conv": rounded.conv})
    assert torch.equal(narrow.state.float(), rounded.state)
    exact = twin(layer, torch.float64)
    off, plain = (in_pieces(exact, x.double(), exact.allocate_cache(2), rounds=rounds) for rounds in (True, False))
    # twice, as float32 rounds to the other neighbour where a state is nearly halfway
    assert 0 < distance(y, in_pieces(layer, x, wide)) <= 2 * distance(off, plain)


def test_states_of_scan_have_gradients(package, device) -> None:
    """A sequence in two pieces, the states handed over, has the gradients of the sequence in one."""
    layer, x = make_layer(package, "softplus").to(device), tokens(device, 1, 7)

    def halves(leaf: Tensor) -> Tensor:
        first, conv, state = layer.scan(leaf[:, :2])
        second, *_ = layer.scan(leaf[:, 2:], conv, state)
        return torch.cat((first, second), 1)

    results = []
    for call in (layer, halves):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        gradients = torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])
        results.append({"y": y.detach(), **{str(i): g for i, g in enumerate(gradients)}})
    assert_close(*results, 2e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_states_of_scan_keep_no_inputs(package, device, fused) -> None:
    """What was convolved last is memory of its own: a view would keep all that was convolved for as long."""
    for width in (2, 4):
        layer = package.M2RNN(HIDDEN, **SHAPES["given"], conv_width=width, fused=fused, device=device)
        with torch.no_grad():
            _, conv, state = layer.scan(tokens(device, 1, 9))
        for x in (conv, state):
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


def test_a_cache_refuses_gradients(package, device) -> None:
    """A call that would lose gradients says so."""
    layer, x = make_layer(package).to(device), tokens(device, 1, 2)
    with pytest.raises(RuntimeError, match="cache has no gradients"):
        layer(x, layer.allocate_cache(1))


def test_initial_values(package) -> None:
    """Every parameter starts as published: ranges of A and dt, W = I, D = 1, and a scale that keeps variances."""
    torch.manual_seed(3)
    layer = package.M2RNN(256, **PLAIN)
    gate = package.M2RNN(256, 16, 16, PLAIN["heads"]).decay_gate.__class__(5000)
    gate.reset_parameters()
    A, dt = gate.A_log.exp(), nn.functional.softplus(gate.dt_bias)
    assert 0 < A.min() < 0.1
    assert 15.9 < A.max() <= 16
    assert A.mean().item() == pytest.approx(8, abs=0.3)
    assert 1e-3 * (1 - 1e-3) <= dt.min() < 1.1e-3
    assert 0.09 < dt.max() <= 0.1 * (1 + 1e-5)
    assert dt.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.1)
    assert torch.equal(layer.state_weight, torch.eye(16).expand(2, 16, 16))
    assert torch.equal(layer.D, torch.ones(2, 16))
    assert torch.equal(layer.g_norm.weight, torch.ones(32))
    assert layer.input_projection.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert layer.output_projection.weight.std().item() == pytest.approx(32**-0.5, rel=0.05)


def test_the_state_dict_has_the_published_names(package) -> None:
    """A checkpoint is stable: these names and shapes, and nothing else."""
    layer = package.M2RNN(HIDDEN, **GATED, bias=True)
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == {
        "D": (4, 9),
        "state_weight": (4, 9, 9),
        "input_projection.weight": (18 + 9 + 36 + 2 + 18, HIDDEN),
        "input_projection.bias": (18 + 9 + 36 + 2 + 18,),
        "conv1d.weight": (63, 1, 4),
        "conv1d.bias": (63,),
        "decay_gate.A_log": (2,),
        "decay_gate.dt_bias": (2,),
        "g_norm.weight": (36,),
        "output_projection.weight": (HIDDEN, 36),
    }


def test_state_dict_round_trip(package, device, tmp_path: Path) -> None:
    """A layer saved and loaded elsewhere gives the same bits."""
    layer, x = make_layer(package, "softplus").to(device), tokens(device, 1, 3)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = package.M2RNN(HIDDEN, **GATED, bias=True).to(device)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert_same(with_gradients(other, x), with_gradients(layer, x))


def test_meta_device(package) -> None:
    """A layer made on the meta device and then drawn is the one that the same seed draws in place."""
    expected = package.M2RNN(HIDDEN, **GATED)
    torch.manual_seed(5)
    expected.reset_parameters()
    with torch.device("meta"):
        layer = package.M2RNN(HIDDEN, **GATED)
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer = layer.to_empty(device="cpu")
    torch.manual_seed(5)
    layer.reset_parameters()
    assert_same(dict(layer.state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(package, device, reentrant) -> None:
    """A recomputed layer gives the same bits."""
    layer, x = make_layer(package, "softplus").to(device), tokens(device, 1, 4)
    expected = with_gradients(layer, x)
    leaf = x.detach().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(layer, leaf, use_reentrant=reentrant)
    y.backward(loss_weights(y))
    given = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert_same({"y": y.detach(), "x": leaf.grad, **given}, expected)


def test_autocast(package, device) -> None:
    """Under autocast a float32 layer runs the bf16 kernels, and decodes; gradients stay in float32."""
    layer, x = make_layer(package, "softplus").to(device), tokens(device, 1, 4)
    with torch.autocast(device.type, torch.bfloat16):
        results = with_gradients(layer, x)
        with torch.no_grad():
            cache = layer.allocate_cache(1)
            pieces = torch.cat((layer(x[:, :3], cache), layer(x[:, 3:], cache)), 1)
    assert results["y"].dtype == torch.bfloat16
    assert {results[name].dtype for name, _ in layer.named_parameters()} == {torch.float32}
    assert_close({"y": pieces}, {"y": results["y"]}, 2**-7)
    exact = with_gradients(twin(layer, torch.float64), x.double())
    assert distance(results["y"], exact["y"]) < 2**-5


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_without_breaks(package, device, packed) -> None:
    """The layer is one graph, forward and backward, with eager's results."""
    layer, x = make_layer(package).to(device), tokens(device, 6) if packed else tokens(device, 1, 6)
    call = {"cu_seqlens": offsets_of((4, 2)).to(device)} if packed else {}
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    names = {name: name.removeprefix("_orig_mod.") for name, _ in compiled.named_parameters()}
    given = {names.get(name, name): value for name, value in with_gradients(compiled, x, **call).items()}
    assert_close(given, with_gradients(layer, x, **call), 2e-6)


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_without_breaks_under_autocast(package, device, shape, backend) -> None:
    """The layer is one graph of the same kernels, or of the reference, in bf16, with eager's results."""
    layer, x = make_layer(package, shape, backend=backend).to(device), tokens(device, 1, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, torch.bfloat16):
        given, expected = with_gradients(compiled, x), with_gradients(layer, x)
    assert given["y"].dtype == torch.bfloat16
    # aot_eager keeps what autocast casts, but may add up gradients of a tensor with two uses in another order
    assert_close(dict(zip(expected, given.values(), strict=True)), expected, 2**-7)


def test_from_variant(package) -> None:
    """A layer of the spec, or a variant by its key, gives dims and heads; another name says what there is."""
    key = make_variant(9, 9, GROUPED, "bf16", gate="softplus").key
    layer = package.M2RNN.from_variant(key, HIDDEN, gate_heads=2, bias=True, backend="reference")
    expected = package.M2RNN(HIDDEN, **GATED, bias=True, backend="reference")
    assert repr(layer) == repr(expected)
    with pytest.raises(ValueError, match="name must be a layer \\(layer\\) or the key of a built variant, got 'other'"):
        package.M2RNN.from_variant("other", HIDDEN)
    with pytest.raises(ValueError, match=f"layer is a grid; name one of its variants: .*{key}"):
        package.M2RNN.from_variant("layer", HIDDEN)


def test_from_variant_of_a_committed_package() -> None:
    """The layer that the README makes has the dims of the spec's."""
    from generated import h100

    layer = h100.M2RNN.from_variant("m2rnn_7b", hidden_size=64, device="meta")
    assert (layer.state_expansion, layer.head_dim, tuple(layer.heads)) == (64, 16, (1, 1, 132, 132, 132))
    assert h100.M2RNN.from_variant("odd", 64, device="meta").heads.q == 7  # one point in three dtypes


def _with(**changes: Any) -> dict[str, Any]:
    return {"hidden_size": HIDDEN, **PLAIN, **changes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (_with(state_expansion=48), "layers of layered.yaml `my_layer: {head_dim: 16, state_expansion: 48, "),
        (_with(heads={"q": 1, "k": 1, "v": 2, "f": 2, "w": 3}), "heads of v must divide 3, got 2"),
        (_with(heads={"q": 1, "k": 1, "v": 2}), "heads must be of q, k, v, f, w and optionally g, got q, k, v"),
        (_with(heads={**PLAIN["heads"], "g": 3}), "heads of g must divide 2, got 3"),
        (_with(conv_width=0), "conv_width must be at least 1 or None, got 0"),
        (_with(activation="swiglu"), "activation must be None or one of"),
        (_with(norm="p_norm"), "norm must be None, rmsnorm or layernorm, got 'p_norm'"),
        (_with(forget_inputs=3), "forget_inputs must divide the 2 heads of f, got 3"),
        (_with(hidden_size=0), "hidden_size must be at least 1, got 0"),
        (_with(state_expansion=0), "state_expansion must be at least 1, got 0"),
        (_with(norm_eps=-1e-5), "norm_eps must be at least 0, got -1e-05"),
        (_with(clip=-1.0), "clip must be a bound of at least 0 or None, got -1.0"),
        (_with(backend="cuda"), "backend must be kernels or reference, got 'cuda'"),
    ],
)
def test_bad_arguments(package, arguments, message) -> None:
    """Whatever cannot be made is refused at once, with the spec lines to add where kernels are missing."""
    with pytest.raises(ValueError, match=re.escape(message)):
        package.M2RNN(**arguments)


def test_unbuilt_dims_raise_the_operators_error(package) -> None:
    """The error is the operator's, names the built variants, and the reference needs none of them."""
    with pytest.raises(package.VariantNotBuiltError, match="built: k16_v16"):
        package.M2RNN(**_with(head_dim=8))
    layer = package.M2RNN(**_with(head_dim=8), backend="reference")
    assert layer(tokens(torch.device("cpu"), 1, 2)).shape == (1, 2, HIDDEN)


def test_an_unbuilt_dtype_is_an_error_of_the_call(package, device) -> None:
    """A layer moved to a dtype without kernels says so when it is called."""
    layer = make_layer(package).to(device, torch.float16)
    with pytest.raises(package.VariantNotBuiltError, match="dtypes: \\[fp16\\]"):
        layer(tokens(device, 1, 2).half())


@pytest.mark.parametrize(
    ("shape", "call", "message"),
    [
        ((2, 3, 8), {}, r"x must be \(B, S, 24\), got \(2, 3, 8\)"),
        ((3, HIDDEN), {}, r"x must be \(B, S, 24\), got \(3, 24\)"),
        ((2, 3, HIDDEN), {"cu_seqlens": [0, 3]}, r"x must be \(T, 24\), got \(2, 3, 24\)"),
        ((2, 3, HIDDEN), {"attention_mask": [[1, 1, 1]]}, r"attention_mask must be \(2, 3\), got \(1, 3\)"),
        ((3, HIDDEN), {"cu_seqlens": [0, 3], "attention_mask": [[1]]}, "must not be given together"),
        ((3, HIDDEN), {"cu_seqlens": [0, 2]}, "must end at the 3 tokens"),
        ((3, HIDDEN), {"cu_seqlens": [0]}, r"cu_seqlens must be \(B \+ 1,\), got \(1,\) for 3 tokens"),
    ],
)
def test_bad_calls(package, device, shape, call, message) -> None:
    """Inputs that do not fit are refused with the shape that was expected."""
    layer = make_layer(package).to(device)
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape, device=device), **{name: torch.tensor(x, device=device) for name, x in call.items()})


def test_the_gate_runs_where_the_package_has_it(package, device, monkeypatch) -> None:
    """A softplus variant gets the gate's input and parameters; another gets the gate itself, in float32."""
    module, seen = module_of(package, "scan"), []

    def spy(*operands: Tensor, A_log: Tensor | None = None, **rest: Any) -> Any:
        seen.append((A_log is not None, operands[4].dtype))
        return package.m2rnn(*operands, A_log=A_log, **rest)

    monkeypatch.setattr(module, "m2rnn", spy)
    for shape in SHAPES:
        layer = make_layer(package, shape).to(device, torch.bfloat16)
        layer.fused = False
        layer(tokens(device, 1, 2).bfloat16())
    assert seen == [(False, torch.float32), (True, torch.bfloat16)]
