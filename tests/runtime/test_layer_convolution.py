"""The layer's convolution by itself: sequences one by one, packed, and cut in two, to the bit; and any module's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from calls import assert_close, assert_same, distance, module_of, offsets_of
from layer import PLAIN, layered, make_layer, tokens
from torch import Tensor, nn

CHANNELS = 6
LENGTHS = (7, 0, 1, 2, 9)
"""Lengths of packed sequences: longer than the widest convolution, empty, and shorter."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the package that serves the layers of these tests."""
    return layered(tmp_path_factory.mktemp("convolved"))


@pytest.fixture
def convolution(package) -> ModuleType:
    """Return the package's module."""
    return module_of(package, "convolution")


def inputs(device: torch.device, *lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return inputs of all channels."""
    drawn = torch.randn(*lead, CHANNELS, generator=torch.Generator().manual_seed(sum(lead)))
    return drawn.to(device, dtype).requires_grad_()


def made(convolution: ModuleType, device: torch.device, width: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a depthwise convolution with a bias."""
    torch.manual_seed(width)
    return convolution.DepthwiseConv1d(CHANNELS, CHANNELS, width, groups=CHANNELS).to(device, dtype)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_module_of_this_class_is_torchs(convolution, device, width) -> None:
    """Results and gradients are those of ``nn.Conv1d``, for a depthwise convolution and whatever else is made of it."""
    make = convolution.DepthwiseConv1d
    for options in ({"groups": CHANNELS}, {}, {"groups": 2, "stride": 2}, {"groups": CHANNELS, "padding": 2}):
        module = make(CHANNELS, CHANNELS, width, **options).double().to(device)
        plain = nn.Conv1d(CHANNELS, CHANNELS, width, **options).double().to(device)
        plain.load_state_dict(module.state_dict())
        results = []
        for one in (module, plain):
            leaf = inputs(device, 2, 9, dtype=torch.float64)
            y = one(leaf.mT)
            gradients = torch.autograd.grad(y.square().sum(), [leaf, *one.parameters()])
            results.append({"y": y.detach(), **dict(zip(("x", "weight", "bias"), gradients, strict=True))})
        assert_close(*results, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("begun", [False, True], ids=["from zeros", "from states"])
def test_packed_sequences_have_the_bits_that_they_have_alone(convolution, device, width, dtype, begun) -> None:
    """Packed sequences and the states after them have the bits of calls alone, also continued; gradients agree."""
    module, offsets = made(convolution, device, width, dtype), offsets_of(LENGTHS).to(device)
    x, before = inputs(device, sum(LENGTHS), dtype=dtype), inputs(device, len(LENGTHS), width - 1, dtype=dtype)
    together, after = convolution.convolve_packed(module, x, width, offsets, before if begun else None)
    alone, places = [], list(pairwise(offsets.tolist()))
    for i, (start, end) in enumerate(places):
        y, last = convolution.convolve(module, x[None, start:end], width, before[i : i + 1] if begun else None)
        assert_same({"y": y[0], "after": last[0]}, {"y": together[start:end], "after": after[i]})
        middle = (start + end) // 2
        first, state = convolution.convolve(module, x[None, start:middle], width, before[i : i + 1] if begun else None)
        second, state = convolution.convolve(module, x[None, middle:end], width, state)
        assert_same({"y": torch.cat((first, second), 1)[0], "after": state[0]}, {"y": y[0], "after": last[0]})
        alone.append(y[0])
    leaves = [x, *module.parameters(), *([before] if begun and width > 1 else [])]
    weights = torch.linspace(-1, 1, together.numel(), device=device).view_as(together).cos().to(dtype)
    given, expected = (torch.autograd.grad(y, leaves, weights) for y in (together, torch.cat(alone)))
    tolerance = 8 * torch.finfo(dtype).eps  # sums over tokens are in another order
    for one, other in zip(given, expected, strict=True):
        assert distance(one, other) <= tolerance


@pytest.mark.parametrize("offsets", [[0, 100, -50, 18], [18, 0, 18, 0], [7, 7, 7, 7], [2**40, 0, -(2**40), 3]])
def test_offsets_that_are_none_never_leave_the_inputs(convolution, device, offsets) -> None:
    """Offsets are read by the operator, and under the capture of a graph by nobody: what they hold stays inside."""
    module, x = made(convolution, device, 4), inputs(device, 18)
    before = inputs(device, 3, 3)
    y, after = convolution.convolve_packed(module, x, 4, torch.tensor(offsets, device=device), before)
    assert y.shape == x.shape
    assert after.shape == before.shape


PLAIN_CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "batch": lambda layer, x: layer(x[:, :0]),
    "packed": lambda layer, x: layer(x[0, :0], cu_seqlens=torch.tensor([0, 0, 0], device=x.device)),
    "nothing packed": lambda layer, x: layer(x[0, :0], cu_seqlens=torch.tensor([0], device=x.device)),
    "padded": lambda layer, x: layer(x, attention_mask=x.new_zeros(x.shape[:2])),
    "no sequences": lambda layer, x: layer(x[:0]),
}


@pytest.mark.parametrize("plain", [False, True], ids=["own", "torch's"])
@pytest.mark.parametrize("how", PLAIN_CALLS)
def test_calls_without_tokens(package, device, how, plain) -> None:
    """They give nothing, and call every child, so that ranks that wait for each other in one are in step."""
    layer, x = make_layer(package).to(device), tokens(device, 2, 3)
    if plain:
        channels = layer.conv1d.in_channels
        layer.conv1d = nn.Conv1d(channels, channels, layer.conv_width, groups=channels, device=device)
    seen: list[str] = []
    for name, child in layer.named_children():
        child.register_forward_hook(lambda *_, name=name: seen.append(name))
    y = PLAIN_CALLS[how](layer, x)
    assert not y.any()
    assert sorted(seen) == sorted(name for name, _ in layer.named_children())


def test_a_layer_without_a_convolution(package, device) -> None:
    """One column is a scale; its cache holds no inputs, and goes on all the same."""
    layer, x = package.M2RNN(24, **PLAIN, conv_width=1, bias=True).to(device), tokens(device, 2, 4)
    with torch.no_grad():
        cache = layer.allocate_cache(2)
        assert cache.conv.shape == (2, 0, 64)
        pieces = [layer(x[:, start:end], cache) for start, end in ((0, 2), (2, 3), (3, 4))]
        assert_close({"y": torch.cat(pieces, 1)}, {"y": layer(x)}, 2e-6)
        packed = layer(x.flatten(0, 1), layer.allocate_cache(2), cu_seqlens=offsets_of((4, 4)).to(device))
        assert_same({"y": packed.view_as(x)}, {"y": layer(x)})
