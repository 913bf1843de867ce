"""The layer with flash-linear-attention's signature: what it gives, and what it asks of a cache and keeps there."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import distance
from layer import HIDDEN, SHAPES, layered, loss_weights, make_layer, tokens
from support import ROOT
from torch import Tensor
from torch.nn import functional as F
from watch import WAITS, Watch

BACKENDS = ("kernels", "reference")
ROUNDING = 1e-5
PLACE = 2
PIECES = (3, 1, 2, 1)
NO_FLA = "flash-linear-attention is not installed"


class RecordedCache:
    """Stands for flash-linear-attention's cache, and notes what is asked of it."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any] | None] = []
        self.updates: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, layer_idx: int) -> dict[str, Any] | None:
        if layer_idx >= len(self):
            raise KeyError(f"Cache only have {len(self)} layers, however accessed {layer_idx} out of bounds")
        return self.states[layer_idx]

    def update(
        self,
        recurrent_state: Tensor | None = None,
        attn_state: Any = None,
        conv_state: Any = None,
        ffn_state: Any = None,
        layer_idx: int = 0,
        offset: int = 1,
        cache_kwargs: Any = None,
    ) -> dict[str, Any]:
        self.updates.append({"layer_idx": layer_idx, "offset": offset})
        while len(self.states) <= layer_idx:
            self.states.append(None)
        held = self.states[layer_idx] or {"recurrent_state": None, "conv_state": None}
        given = {"recurrent_state": recurrent_state, "conv_state": conv_state}
        self.states[layer_idx] = {**held, **{name: x for name, x in given.items() if x is not None}}
        return self.states[layer_idx]


def real_cache() -> Any:
    """Return flash-linear-attention's cache."""
    pytest.importorskip("fla", reason=NO_FLA)
    return importlib.import_module("fla.models.utils").Cache()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the package of these tests."""
    return layered(tmp_path_factory.mktemp("fla_layer"))


def made(package: ModuleType, backend: str = "reference", shape: str = "given", **options: Any) -> Any:
    """Return a layer at place ``PLACE`` of its model, whose parameters are drawn."""
    module = importlib.import_module(f"{package.__name__}.integrations.fla")
    layer = module.M2RNNLayer(HIDDEN, layer_idx=PLACE, backend=backend, **{**SHAPES[shape], **options})
    if not options:
        layer.mixer = make_layer(package, shape, backend=backend)
    return layer


def test_the_signature_is_theirs(package) -> None:
    """Names, order and defaults of ``forward`` are those of every layer of flash-linear-attention."""
    parameters = inspect.signature(type(made(package)).forward).parameters
    assert list(parameters)[1:] == [
        "hidden_states", "attention_mask", "past_key_values", "use_cache", "output_attentions", "kwargs",
    ]  # fmt: skip
    assert [x.default for x in parameters.values()][2:6] == [None, None, False, False]


def test_their_own_layers_have_it() -> None:
    """The installed version's layer has the arguments that the test above names."""
    pytest.importorskip("fla", reason=NO_FLA)
    theirs = inspect.signature(importlib.import_module("fla.layers").GatedDeltaNet.forward).parameters
    assert list(theirs)[1:] == [
        "hidden_states", "attention_mask", "past_key_values", "use_cache", "output_attentions", "kwargs",
    ]  # fmt: skip


def test_nothing_of_theirs_is_imported() -> None:
    """The layer needs neither flash-linear-attention nor transformers."""
    code = "import sys, m2gen.runtime.integrations.fla; assert not {'fla', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_results_are_the_layers(package, device, backend, shape) -> None:
    """Without a cache it gives what ``M2RNN`` gives, no scores, and no cache."""
    layer, x = made(package, backend, shape).to(device), tokens(device, 2, 5)
    y, scores, cache = layer(x, output_attentions=True, position_ids=torch.arange(5, device=device)[None])
    assert torch.equal(y, layer.mixer(x))
    assert (scores, cache) == (None, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nested", [False, True])
def test_packed_batches(package, device, backend, nested) -> None:
    """Offsets of a batch of one keep sequences apart, also as a batch of one row of them, whatever a mask says."""
    layer, lengths = made(package, backend).to(device), (3, 0, 2)
    x = tokens(device, 1, sum(lengths))
    offsets = torch.tensor([0, 3, 3, 5], dtype=torch.int32, device=device)
    mask = torch.zeros(1, 5, device=device)
    y, _, _ = layer(x, mask, cu_seqlens=offsets[None] if nested else offsets)
    assert y.shape == x.shape
    alone = torch.cat([layer(part)[0] for part in x.split(lengths, 1) if part.shape[1]], 1)
    assert distance(y, alone) < ROUNDING


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_of_the_host_leave_the_device_alone(package, device, monkeypatch, backend) -> None:
    """With a copy of the offsets on the CPU, training and prefill read those on the device nowhere."""
    layer, x = made(package, backend).to(device), tokens(device, 1, 5)
    host = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    expected = layer(x, cu_seqlens=host.to(device).clone())[0]
    fresh = host.clone().to(device)
    with monkeypatch.context() as patch:
        seen = Watch(patch, fresh)
        y, _, _ = layer(x, cu_seqlens=fresh[None], cu_seqlens_cpu=host[None])
        y.sum().backward()
        cache = RecordedCache()
        layer(x, past_key_values=cache, use_cache=True, cu_seqlens=fresh, cu_seqlens_cpu=host)
        assert WAITS.isdisjoint(seen.found)
        layer(x, cu_seqlens=fresh)
        assert "tolist" in seen.found
    assert torch.equal(y, expected)
    assert cache[PLACE]["recurrent_state"].shape[0] == 3


@pytest.mark.parametrize("make_cache", [RecordedCache, real_cache])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_goes_on_where_it_was(package, device, backend, shape, gradients, make_cache) -> None:
    """A prefill, a chunk and tokens one by one are as the whole; states that were handed out do not change."""
    layer, x, cache = made(package, backend, shape).to(device), tokens(device, 2, sum(PIECES)), make_cache()
    pieces, states, before = [], [], []
    with torch.set_grad_enabled(gradients):
        whole, _, _ = layer(x)
        for piece in x.split(PIECES, 1):
            y, _, same = layer(hidden_states=piece, past_key_values=cache, use_cache=True)
            assert same is cache
            pieces.append(y)
            states.append(cache[PLACE]["recurrent_state"])
            before.append(states[-1].detach().clone())
    assert distance(torch.cat(pieces, 1), whole) < ROUNDING
    assert all(torch.equal(kept, copy) for kept, copy in zip(states, before, strict=True))
    assert states[0].dtype == torch.float32
    if isinstance(cache, RecordedCache):
        assert cache.updates == [{"layer_idx": PLACE, "offset": steps} for steps in PIECES]
    else:
        assert cache.get_seq_length(PLACE) == sum(PIECES)


@pytest.mark.parametrize("make_cache", [RecordedCache, real_cache])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_padding_on_the_left(package, device, backend, dtype, make_cache) -> None:
    """Prompts of several lengths, padded, and tokens after them, give what each gives alone; padding gives 0."""
    layer, lengths, cache = made(package, backend).to(device), (5, 2), make_cache()
    alone = [tokens(device, 1, length + 2, seed=length) for length in lengths]
    prompts = [F.pad(x[:, :length], (0, 0, 5 - length, 0), value=3.0) for x, length in zip(alone, lengths, strict=True)]
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]], device=device).to(dtype)
    with torch.no_grad():
        y = [layer(torch.cat(prompts), mask, cache, use_cache=True)[0]]
        for t in (0, 1):
            mask = F.pad(mask, (0, 1), value=1)
            following = torch.cat([x[:, n + t : n + t + 1] for x, n in zip(alone, lengths, strict=True)])
            y.append(layer(following, mask, cache, use_cache=True)[0])
        together = torch.cat(y, 1)
        for row, (x, length) in enumerate(zip(alone, lengths, strict=True)):
            assert distance(together[row, 5 - length :], layer(x)[0][0]) < ROUNDING
    assert together[1, :3].eq(0).all()


@pytest.mark.parametrize("make_cache", [RecordedCache, real_cache])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_go_through_the_cache(package, device, backend, make_cache) -> None:
    """The loss of later tokens reaches inputs and parameters of earlier ones as in one call."""
    layer, x, cache = made(package, backend).to(device), tokens(device, 2, 5).requires_grad_(), make_cache()
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x)[0], leaves, loss_weights(layer(x)[0]))
    y = torch.cat([layer(part, None, cache, use_cache=True)[0] for part in x.split((3, 1, 1), 1)], 1)
    found = torch.autograd.grad(y, leaves, loss_weights(y))
    assert max(map(distance, found, expected)) < ROUNDING


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_prompt_go_through_a_frozen_layer(package, device, backend) -> None:
    """A token of which nothing wants gradients hands on those of the states before it."""
    layer, cache = made(package, backend).to(device).requires_grad_(False), RecordedCache()
    first, second = tokens(device, 2, 5).split((4, 1), 1)
    first.requires_grad_()
    layer(first, past_key_values=cache, use_cache=True)
    y, _, _ = layer(second, past_key_values=cache)
    whole = layer(torch.cat((first, second), 1))[0][:, 4:]
    found, wanted = (torch.autograd.grad(each, first, loss_weights(y))[0] for each in (y, whole))
    assert distance(found, wanted) < ROUNDING


def test_compiled_training(package, device) -> None:
    """A packed step on the kernels is one graph, in which offsets may change."""
    torch._dynamo.reset()
    layer, x = made(package, "kernels").to(device), tokens(device, 1, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
    leaves = list(layer.parameters())
    y = compiled(x, cu_seqlens=offsets, position_ids=None)[0]
    expected = layer(x, cu_seqlens=offsets)[0]
    assert distance(y, expected) < ROUNDING
    found, wanted = (torch.autograd.grad(each, leaves, loss_weights(y)) for each in (y, expected))
    assert max(map(distance, found, wanted)) < ROUNDING
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = torch.tensor([0, 1, 5], dtype=torch.int32, device=device)
        assert distance(compiled(x, cu_seqlens=other, position_ids=None)[0], layer(x, cu_seqlens=other)[0]) < ROUNDING


@pytest.mark.parametrize("backend", BACKENDS)
def test_their_cache_reorders_the_states(package, device, backend) -> None:
    """Operations on sequences of the cache are on the states of the layer, too."""
    pytest.importorskip("fla", "0.6", reason=f"{NO_FLA}, or is older than 0.6, which reorders no cache")
    cache = real_cache()
    layer, x = made(package, backend).to(device), tokens(device, 2, 4)
    with torch.no_grad():
        expected = layer(x)[0][:, 3:]
        layer(x[:, :3], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([2, 0, 1, 3], device=device))
        y, _, _ = layer(x[[1, 0, 0, 1], 3:], past_key_values=cache, use_cache=True)
    assert distance(y, expected[[1, 0, 0, 1]]) < ROUNDING


def test_a_cache_is_not_written_unless_asked_for(package, device) -> None:
    """Without ``use_cache`` the call goes on from the states and leaves them."""
    layer, x, cache = made(package).to(device), tokens(device, 2, 5), RecordedCache()
    layer(x[:, :3], past_key_values=cache, use_cache=True)
    y, _, _ = layer(x[:, 3:], past_key_values=cache)
    assert distance(y, layer(x)[0][:, 3:]) < ROUNDING
    assert cache.updates == [{"layer_idx": PLACE, "offset": 3}]


def test_a_layer_without_a_convolution_keeps_none(package, device) -> None:
    """Caches hold no state of a convolution that is not there."""
    layer, cache = made(package, conv_width=None).to(device), RecordedCache()
    x = tokens(device, 2, 4)
    with torch.no_grad():
        y = torch.cat([layer(part, past_key_values=cache, use_cache=True)[0] for part in x.split((3, 1), 1)], 1)
        assert distance(y, layer(x)[0]) < ROUNDING
    assert cache[PLACE]["conv_state"] is None


def test_states_of_another_dtype_go_on(package, device) -> None:
    """What autocast left in a cache serves a step without it."""
    layer, cache, x = made(package).to(device), RecordedCache(), tokens(device, 2, 4)
    with torch.no_grad():
        with torch.autocast(device.type, torch.bfloat16):
            layer(x[:, :3], past_key_values=cache, use_cache=True)
        assert cache[PLACE]["conv_state"].dtype == torch.bfloat16
        y, _, _ = layer(x[:, 3:], past_key_values=cache, use_cache=True)
        assert distance(y, layer(x)[0][:, 3:]) < 0.02
    assert cache[PLACE]["recurrent_state"].dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"attention_mask must be \(B, past \+ S\), got \(2, 1, 5, 5\)"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must be \(2, 5\), got \(2, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"hidden_states must be \(1, T, hidden_size\) with cu_seqlens, got \(2"),
        ({"cu_seqlens": torch.zeros(2, 3)}, r"cu_seqlens must be \(sequences \+ 1,\), got \(2, 3\)"),
        ({"cu_seqlens_cpu": torch.zeros(1)}, "cu_seqlens_cpu must come with cu_seqlens"),
    ],
)
def test_what_does_not_fit_is_an_error(package, device, call, message) -> None:
    """Masks and offsets of another shape are refused by name."""
    with pytest.raises(ValueError, match=message):
        made(package).to(device)(tokens(device, 2, 5), **call)


def test_a_cache_needs_a_place(package, device) -> None:
    """A layer that was not told its place refuses a cache."""
    layer = made(package).to(device)
    layer.layer_idx = None
    with pytest.raises(ValueError, match="layer_idx must be a number where past_key_values is given, got None"):
        layer(tokens(device, 1, 2), past_key_values=RecordedCache())
