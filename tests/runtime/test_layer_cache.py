"""A cache that does not fit is an error of one line, and a call that fails writes nothing in place."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import Results, assert_alike, assert_same, module_of, offsets_of
from layer import HIDDEN, SHAPES, layered, make_layer, tokens
from torch import Tensor, nn


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the package that serves the layers of these tests."""
    return layered(tmp_path_factory.mktemp("cached"))


def moved(layer: nn.Module, device: torch.device) -> Any:
    """Return a cache of two sequences that have begun."""
    cache = layer.allocate_cache(2, device=device)
    with torch.no_grad():
        layer(tokens(device, 2, 3, seed=7), cache)
    return cache


def contents(cache: Any) -> Results:
    """Return copies of both states."""
    return {"conv": cache.conv.clone(), "state": cache.state.clone()}


CALLS: dict[str, Callable[[nn.Module, Tensor, Any], Tensor]] = {
    "prompt": lambda layer, x, cache: layer(x, cache),
    "step": lambda layer, x, cache: layer(x[:, :1], cache),
    "packed": lambda layer, x, cache: layer(x.flatten(0, 1), cache, cu_seqlens=offsets_of((5, 1)).to(x.device)),
    "padded": lambda layer, x, cache: layer(x, cache, attention_mask=x.new_tensor([[1, 1, 0], [0, 1, 0]])),
    "masked step": lambda layer, x, cache: layer(x[:, :1], cache, attention_mask=x.new_tensor([[1], [0]])),
}
"""Every way to move two sequences on."""


class Failed(BaseException):
    """An exception that is not an ``Exception``, as a KeyboardInterrupt."""


def fail(*_: Any) -> None:
    """Stand for a hook that finds no memory, or a user who loses patience."""
    raise Failed


def assert_nothing_written(layer: nn.Module, device: torch.device, cache: Any, how: str, place: Any) -> None:
    """Fail unless a call that fails leaves a cache from which the same call gives what it would have given."""
    x, before, other = tokens(device, 2, 3), contents(cache), copy.deepcopy(cache)
    with torch.no_grad():
        with place, pytest.raises(Failed):
            CALLS[how](layer, x, cache)
        assert_same(contents(cache), before)
        assert_same({"y": CALLS[how](layer, x, cache)}, {"y": CALLS[how](layer, x, other)})
    assert_same(contents(cache), contents(other))
    assert not torch.equal(cache.state, before["state"])


@contextmanager
def hooked(module: nn.Module) -> Iterator[None]:
    """Have a module fail after its forward."""
    handle = module.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("how", CALLS)
def test_a_call_that_fails_writes_nothing(package, device, how, backend) -> None:
    """Whichever child fails, the last one included, both states are what they were, and the call can be repeated."""
    layer = make_layer(package, backend=backend).to(device)
    cache = moved(layer, device)
    for name in ("conv1d", "decay_gate", "g_norm", "output_projection"):
        assert_nothing_written(layer, device, cache, how, hooked(getattr(layer, name)))


@pytest.mark.parametrize("how", CALLS)
def test_an_operator_that_fails_after_it_has_run_writes_nothing(package, device, how) -> None:
    """A step's kernel has advanced the state when something fails behind it: the state goes back."""
    layer = make_layer(package, "softplus").to(device)

    @contextmanager
    def failing() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for module, name in ((module_of(package, "scan"), "m2rnn"), (module_of(package, "decode"), "m2rnn_step")):
                operator = getattr(module, name)
                patch.setattr(module, name, lambda *x, operator=operator, **more: (operator(*x, **more), fail()))
            yield

    assert_nothing_written(layer, device, moved(layer, device), how, failing())


SHARING = {
    "expanded sequences": lambda x: x[:1].clone().expand(x.shape),
    "expanded in the middle": lambda x: x[:, :1].clone().expand(x.shape),
    "expanded columns": lambda x: x[..., :1].clone().expand(x.shape),
    "overlapping strides": lambda x: x.new_zeros(2 * x.numel()).as_strided(x.shape, (1, *x.stride()[1:])),
}
MESSAGE = (
    "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
    "Please clone() the tensor before performing the operation."
)


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("name", ["conv", "state"])
def test_elements_that_share_memory_are_refused(package, device, name, how) -> None:
    """The error is that of torch for such a tensor, and comes before anything is written to the other one."""
    layer, x = make_layer(package).to(device), tokens(device, 2, 3)
    for share in SHARING.values():
        cache = moved(layer, device)
        setattr(cache, name, share(getattr(cache, name)))
        before = contents(cache)
        with torch.no_grad(), pytest.raises(RuntimeError, match=re.escape(MESSAGE)) as caught:
            CALLS[how](layer, x, cache)
        assert f"cache.{name}" in str(caught.value)
        assert_same(contents(cache), before)


def test_torch_says_the_same() -> None:
    """The words are torch's own."""
    with pytest.raises(RuntimeError, match=re.escape(MESSAGE)):
        torch.zeros(1).expand(2).copy_(torch.ones(2))


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_caches_of_any_strides_that_share_nothing(package, device, shape, how) -> None:
    """A cache may be transposed, or a part of a larger one, of whose rest nothing is written."""
    layer, x = make_layer(package, shape).to(device), tokens(device, 2, 3)
    expected = moved(layer, device)
    wide = {name: part.new_full((4, *part.shape[1:], 2), 3.0) for name, part in contents(expected).items()}
    views = {name: part[1:4:2, ..., 1] for name, part in wide.items()}
    for name, view in views.items():
        view.copy_(getattr(expected, name))
    cache = package.M2RNNCache(views["conv"], views["state"].mT.contiguous().mT)
    with torch.no_grad():
        assert_alike({"y": CALLS[how](layer, x, cache)}, {"y": CALLS[how](layer, x, expected)}, device)
    assert_alike(contents(cache), contents(expected), device)
    assert bool((wide["conv"][::2] == 3).all())
    assert bool((wide["conv"][..., 0] == 3).all())


def _set(name: str, change: Callable[[Tensor], Any]) -> Callable[[ModuleType, nn.Module], Any]:
    """Return a function that makes a cache of which one state is changed."""

    def make(_: ModuleType, layer: nn.Module) -> Any:
        cache = layer.allocate_cache(2)
        setattr(cache, name, change(getattr(cache, name)))
        return cache

    return make


STATE = "cache.state must be torch.float32 or torch.bfloat16, got torch."
CONV = "cache.conv must be torch.float32, as what is convolved is, or wider, got torch."
WRONG: dict[str, tuple[Callable[[ModuleType, nn.Module], Any], type[Exception], str]] = {
    "batch": (
        lambda _, layer: layer.allocate_cache(3),
        ValueError,
        "cache.conv must be (2, 3, 64), got (3, 3, 64)",
    ),
    "batch of the state": (
        _set("state", lambda x: x[:1]),
        ValueError,
        "cache.state must be (2, 2, 16, 16), got (1, 2, 16, 16)",
    ),
    "device": (
        lambda _, layer: layer.allocate_cache(2, "meta"),
        ValueError,
        "cache.conv must be on DEVICE as x is, got meta",
    ),
    "device of the state": (
        _set("state", lambda x: x.to("meta")),
        ValueError,
        "cache.state must be on DEVICE as x is, got meta",
    ),
    "wider state": (_set("state", Tensor.double), TypeError, STATE + "float64"),
    "half state": (_set("state", Tensor.half), TypeError, STATE + "float16"),
    "narrow conv": (lambda _, layer: layer.allocate_cache(2, dtype=torch.bfloat16), TypeError, CONV + "bfloat16"),
    "integers": (_set("conv", Tensor.int), TypeError, CONV + "int32"),
    "other dims": (
        lambda package, _: make_layer(package, "softplus").allocate_cache(2),
        ValueError,
        "cache.conv must be (2, 3, 64), got (2, 3, 63)",
    ),
    "conv width": (
        lambda package, _: make_layer(package, conv_width=5).allocate_cache(2),
        ValueError,
        "cache.conv must be (2, 3, 64), got (2, 4, 64)",
    ),
    "another layer": (
        lambda package, _: make_layer(package).allocate_cache(2),
        ValueError,
        "cache must be of this layer",
    ),
    "gradients": (
        _set("state", Tensor.requires_grad_),
        RuntimeError,
        "cache.state must not require a gradient",
    ),
    "tuple": (
        lambda _, layer: tuple(vars(layer.allocate_cache(2)).values()),
        TypeError,
        "cache must be what allocate_cache returns, got tuple",
    ),
    "nothing": (_set("conv", lambda _: None), TypeError, "cache must be what allocate_cache returns, got M2RNNCache"),
}


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("name", WRONG)
def test_a_cache_that_does_not_fit_is_named(package, device, name, backend) -> None:
    """One line says which state of the cache is wrong, what it must be and what it is; nothing has been written."""
    layer, x = make_layer(package, backend=backend).to(device), tokens(device, 2, 3)
    make, kind, message = WRONG[name]
    with torch.device(device):
        cache = make(package, layer)
    expected = re.escape(f"M2RNN: {message.replace('DEVICE', str(x.device))}")
    for how, call in CALLS.items():
        with torch.no_grad(), pytest.raises(kind, match=f"^{expected}") as caught:
            call(layer, x, cache)
        assert "\n" not in str(caught.value), how
    parts = [part for part in (getattr(cache, "conv", None), getattr(cache, "state", None)) if isinstance(part, Tensor)]
    assert not any(bool((part != 0).any()) for part in parts if not part.is_meta)


def test_a_cache_made_in_inference_mode(package, device) -> None:
    """It serves in that mode, and is refused out of it before either state is written."""
    layer, x = make_layer(package).to(device), tokens(device, 2, 3)
    with torch.inference_mode():
        cache = moved(layer, device)
        before = contents(cache)
    for call in CALLS.values():
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"cache\.conv was made under torch\.inference_mode"):
            call(layer, x, cache)
        assert_same(contents(cache), before)


def test_a_copied_cache_is_of_any_layer(package, device) -> None:
    """A copy, an unpickled cache and one that the user made go on with whatever layer has the shapes."""
    layer, x = make_layer(package).to(device), tokens(device, 2, 3)
    twin = copy.deepcopy(layer)
    caches = [moved(layer, device) for _ in range(4)]
    caches[1] = copy.deepcopy(caches[1])
    caches[2] = pickle.loads(pickle.dumps(caches[2]))
    caches[3] = package.M2RNNCache(caches[3].conv, caches[3].state)
    other = make_layer(package).to(device)  # the same values, another layer
    with torch.no_grad():
        expected = twin(x, caches[0])  # a copied layer goes on with the original's
        for cache in caches[1:]:
            assert_same({"y": other(x, cache)}, {"y": expected})
            assert_same(contents(cache), contents(caches[0]))


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"conv": (2, 4, 64)}, "M2RNN: conv must be (2, 3, 64), got (2, 4, 64)"),
        ({"conv": (1, 3, 64)}, "M2RNN: conv must be (2, 3, 64), got (1, 3, 64)"),
        ({"state": (2, 1, 16, 16)}, "M2RNN: state must be (2, 2, 16, 16), got (2, 1, 16, 16)"),
    ],
)
def test_states_of_another_layer_are_refused_by_scan(package, device, states, message) -> None:
    """A convolution's inputs too many would be convolved in the wrong place, silently."""
    layer = make_layer(package).to(device)
    given = {name: torch.zeros(shape, device=device) for name, shape in states.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.scan(tokens(device, 2, 3), **given)


def test_the_device_may_be_number_0(package, monkeypatch) -> None:
    """0 is the first accelerator, not the lack of an answer."""
    layer, seen = package.M2RNN(HIDDEN, **SHAPES["given"]), []
    zeros = torch.zeros

    def noting(*shape: Any, device: Any = None, **more: Any) -> Tensor:
        seen.append(device)
        return zeros(*shape, device="meta", **more)

    monkeypatch.setattr(torch, "zeros", noting)
    layer.allocate_cache(2, device=0)
    assert seen == [0, 0]
