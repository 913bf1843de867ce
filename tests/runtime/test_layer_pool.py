"""A layer on pools of states: what requests get in any order is what each would get alone, and no other slot moves."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import assert_close, assert_same, module_of, offsets_of
from layer import HIDDEN, PLAIN, layered, tokens
from torch import Tensor, nn

SLOTS = 9


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the package that serves the layers of these tests."""
    return layered(tmp_path_factory.mktemp("pooled"))


def drawn(package: ModuleType, device: torch.device, **options: Any) -> nn.Module:
    """Return a layer none of whose parameters is a one or a zero."""
    torch.manual_seed(0)
    layer = package.M2RNN(HIDDEN, **{**PLAIN, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer.to(device)


def poisoned(package: ModuleType, layer: nn.Module, *, turned: bool = False) -> Any:
    """Return a pool full of NaN with room between its slots; ``turned``, the convolution's have channels first."""
    cache = layer.allocate_cache(SLOTS)
    conv = cache.conv.mT if turned else cache.conv
    conv, state = (x.new_full((SLOTS, 2, *x.shape[1:]), torch.nan)[:, 0] for x in (conv, cache.state))
    return package.M2RNNPool(layer, conv, state)


def slots(*numbers: int, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """Return a tensor of slots."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def alone(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a request gets that has the layer for itself, token by token."""
    cache = layer.allocate_cache(1, device=x.device)
    return torch.cat([layer(x[None, t : t + 1], cache)[0] for t in range(x.shape[0])])


@pytest.mark.parametrize(
    ("options", "turned"),
    [({}, False), ({}, True), ({"fused": False}, False), ({"conv_width": None}, False)],
    ids=["kernel", "channels first", "modules", "no convolution"],
)
def test_any_schedule_is_each_request_alone(package, device, options, turned) -> None:
    """Requests are prefilled in chunks and decoded together in changing company and order, beside rows of padding."""
    layer, draw = drawn(package, device, **options), random.Random(0)
    pool = poisoned(package, layer, turned=turned)
    lengths = (7, 3, 5)
    texts = [tokens(device, length, seed=i) for i, length in enumerate(lengths)]
    places, done, found = [8, 0, 4], [0, 0, 0], [[] for _ in lengths]
    with torch.no_grad():
        while any(at < length for at, length in zip(done, lengths, strict=True)):
            turn = [i for i in range(3) if done[i] < lengths[i]]
            turn = draw.sample(turn, draw.randint(1, len(turn)))
            free = draw.choice([place for place in range(SLOTS) if place not in places])
            moved = [free if i == turn[0] else places[i] for i in turn]
            source = slots(*(places[i] for i in turn), -1, device=device)
            target = slots(*moved, -1, device=device)
            new = [done[i] == 0 for i in turn]
            if any(new) or draw.random() < 0.4:
                counts = [draw.randint(1, min(3, lengths[i] - done[i])) for i in turn]
                x = torch.cat([texts[i][done[i] : done[i] + n] for i, n in zip(turn, counts, strict=True)])
                offsets = offsets_of((*counts, 0))
                has = torch.tensor([*(not begins for begins in new), True], device=device)
                y = pool.prefill(
                    x, source, offsets.to(device), offsets, out_indices=target, has_initial_state=has
                ).split(counts)
            else:
                counts = [1] * len(turn)
                x = torch.stack([*(texts[i][done[i]] for i in turn), torch.full_like(texts[0][0], torch.nan)])
                rows = pool.step(x, source, target)
                assert not rows[-1].any()
                y = rows[:-1].split(1)
            for i, place, rows, n in zip(turn, moved, y, counts, strict=True):
                if place != places[i]:  # its old slot is free
                    pool.state[places[i]], pool.conv[places[i]] = torch.nan, torch.nan
                places[i], done[i] = place, done[i] + n
                found[i].append(rows)
        expected = {str(i): alone(layer, text) for i, text in enumerate(texts)}
    assert_close({str(i): torch.cat(rows) for i, rows in enumerate(found)}, expected, 1e-5)
    free = [place for place in range(SLOTS) if place not in places]
    assert pool.state[free].isnan().all()
    assert pool.conv[free].isnan().all()


def test_tokens_and_drafts(package, device) -> None:
    """A state is kept after each of several tokens, and the next call starts from the one that was accepted."""
    layer = drawn(package, device)
    pool, x = poisoned(package, layer), tokens(device, 2, 8)
    table = slots(0, 1, 2, 3, 4, 5, device=device).view(2, 3)
    with torch.no_grad():
        pool.prefill(x[:, :2], table[:, 0], has_initial_state=torch.zeros(2, dtype=torch.bool, device=device))
        first = pool.steps(x[:, 2:5], table, slots(1, 1, device=device))
        accepted = slots(1, 3, device=device)  # of the drafts of the first request none, of the other's both
        again = torch.stack((x[0, 3:6], x[1, 5:8]))
        second = pool.steps(again, table, accepted)
        assert not pool.steps(again, table, slots(0, 4, device=device)).any()
        assert pool.steps(again[:0], table[:0], accepted[:0]).shape == again[:0].shape  # a round with nobody in it
        whole = [alone(layer, text) for text in x]
    assert_close({"y": first}, {"y": torch.stack([y[2:5] for y in whole])}, 1e-5)
    assert_close({"y": second}, {"y": torch.stack((whole[0][3:6], whole[1][5:8]))}, 1e-5)
    assert pool.state[6:].isnan().all()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_go_on_where_a_state_has_no_slot(package, device, fused, dtype) -> None:
    """A state that nobody keeps is the one that the request's next token starts from."""
    layer, x = drawn(package, device, fused=fused), tokens(device, 2, 5)
    whole, some = (poisoned(package, layer) for _ in range(2))
    whole, some = (package.M2RNNPool(layer, pool.conv, pool.state.to(dtype)) for pool in (whole, some))
    table, few = (torch.tensor(rows, device=device) for rows in (((0, 1, 2), (3, 4, 5)), ((-1, SLOTS, 2), (-1, 4, -1))))
    with torch.no_grad():
        for pool in (whole, some):
            pool.prefill(x[:, :2], table[:, 0], has_initial_state=torch.zeros(2, dtype=torch.bool, device=device))
        before = some.state.clone()
        one = slots(1, 1, device=device)
        y, expected = some.steps(x[:, 2:], table, one, few), whole.steps(x[:, 2:], table, one)
        assert some.steps(x[:, :0], table, one, few[:, :0]).shape == (2, 0, HIDDEN)
    assert_same({"y": y}, {"y": expected})
    for name in ("state", "conv"):
        found, wanted = getattr(some, name), getattr(whole, name)
        assert torch.equal(found[[2, 4]], wanted[[2, 4]])
    others = [0, 1, 3, 5, 6, 7, 8]
    assert torch.equal(some.state[others].nan_to_num(), before[others].nan_to_num())


def test_slots_that_the_pool_does_not_have(package, device) -> None:
    """They are left out, as negative ones are."""
    layer = drawn(package, device)
    pool = poisoned(package, layer)
    with torch.no_grad():
        y = pool.step(tokens(device, 2), slots(-3, SLOTS, device=device))
        assert not y.any()
        assert pool.state.isnan().all()
        y = pool.prefill(tokens(device, 2, 2), slots(-1, SLOTS, device=device, dtype=torch.int64))
        assert_same({"y": y}, {"y": layer(tokens(device, 2, 2))})
    assert pool.state.isnan().all()
    assert pool.conv.isnan().all()


def test_allocated_pools(package, device) -> None:
    """A pool of zeros begins every sequence, in any dtype that states may have."""
    layer, x = drawn(package, device), tokens(device, 2, 1)
    with torch.no_grad():
        expected = layer(x)[:, 0]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            pool = package.M2RNNPool.allocate(layer, 4)
            pool = package.M2RNNPool(layer, pool.conv, pool.state.to(dtype))
            assert_close({"y": pool.step(x[:, 0], slots(3, 1, device=device))}, {"y": expected}, 1e-5)
            assert pool.state.dtype == dtype


def test_misuse(package, device, monkeypatch) -> None:
    """Errors say what must be and what was given."""
    layer = drawn(package, device)
    cache, x = layer.allocate_cache(4), tokens(device, 2)
    pool = package.M2RNNPool(layer, cache.conv, cache.state)
    two = slots(0, 1, device=device)
    with pytest.raises(RuntimeError, match=r"M2RNNPool.step computes no gradients; call it under torch.no_grad"):
        pool.step(x, two)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"M2RNNPool.step: indices must be \(2,\), got \(3,\)"):
            pool.step(x, slots(0, 1, 2, device=device))
        with pytest.raises(TypeError, match=r"out_indices must be torch.int32 or torch.int64, got torch.float32"):
            pool.prefill(x[:, None], two, out_indices=two.float())
        with pytest.raises(ValueError, match=r"M2RNNPool.steps: x must be \(B, T, hidden\), indices \(B, C\) and out_"):
            pool.steps(x[:, None], two, two)
        with pytest.raises(TypeError, match=r"M2RNNPool.step: indices must be a tensor, got list"):
            pool.step(x, [0, 1])
        with pytest.raises(TypeError, match=r"M2RNNPool.steps: indices must be a tensor, got list"):
            pool.steps(x[:, None], [[0], [1]], two)
        with pytest.raises(TypeError, match=r"M2RNNPool.steps: accepted must be torch.int32 or .*, got torch.float32"):
            pool.steps(x[:, None], two[:, None], torch.ones(2, device=device))
        with pytest.raises(ValueError, match=r"M2RNNPool.steps: accepted must be \(2,\), got \(1,\)"):
            pool.steps(x[:, None], two[:, None], slots(1, device=device))
        with pytest.raises(TypeError, match=r"M2RNNPool.steps: indices must be torch.int32 or torch.int64, got"):
            pool.steps(x[:, None], two[:, None].float(), slots(1, 1, device=device))
        with pytest.raises(ValueError, match=r"M2RNNPool.step: x must be \(B, 24\), got \(2, 1, 24\)"):
            pool.step(x[:, None], two)
        with pytest.raises(
            TypeError, match=r"M2RNNPool.prefill: has_initial_state must be torch.bool, got torch.uint8"
        ):
            pool.prefill(x[:, None], two, has_initial_state=two.byte())
        with pytest.raises(ValueError, match=r"M2RNNPool.prefill: has_initial_state must be \(2,\), got \(1,\)"):
            pool.prefill(x[:, None], two, has_initial_state=two[:1] > 0)
        for call in (pool.step, lambda x, two: pool.prefill(x[:, None], two)):
            with pytest.raises(
                TypeError, match=r"x must be torch.float32, as the layer's projections are, got torch.bf"
            ):
                call(x.bfloat16(), two)
        assert not pool.state.any()
        monkeypatch.setattr(module_of(package, "layer_pool").pool_checks, "DEBUG", True)
        with pytest.raises(IndexError, match=r"M2RNNPool.step: indices must be below the pool's 4 slots, got 4"):
            pool.step(x, slots(0, 4, device=device))
        with pytest.raises(ValueError, match=r"out_indices must name a slot for one request alone, got 1 for two"):
            pool.step(x, two, slots(1, 1, device=device))
        table = slots(0, 1, 1, 2, device=device).view(2, 2)  # slot 1 is of either, after another token
        with pytest.raises(ValueError, match=r"steps: out_indices must name a slot for one request alone, got 1 for"):
            pool.steps(x[:, None].expand(-1, 2, -1), table, slots(1, 2, device=device))
    with pytest.raises(ValueError, match=r"M2RNNPool: conv must be \(4, 3, 64\), got \(4, 2, 64\)"):
        package.M2RNNPool(layer, cache.conv[:, 1:], cache.state)
    with pytest.raises(TypeError, match=r"M2RNNPool: state must be torch.float32 or .*, got torch.float64"):
        package.M2RNNPool(layer, cache.conv, cache.state.double())
    with pytest.raises(RuntimeError, match=r"M2RNNPool: conv: .*more than one element of the written-to tensor"):
        package.M2RNNPool(layer, cache.conv[:1].expand_as(cache.conv), cache.state)
    with pytest.raises(ValueError, match=r"M2RNNPool: conv must be \(1, 3, 64\), got \(0, 3, 64\)"):
        package.M2RNNPool.allocate(layer, 0)
    frozen, wanting = layer.requires_grad_(False), x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"M2RNNPool.step computes no gradients"):
        package.M2RNNPool(frozen, cache.conv, cache.state).step(wanting, two)
    sizes = {"state_expansion": 5, "head_dim": 7, "heads": dict.fromkeys("qkvfw", 1)}
    with pytest.raises(package.VariantNotBuiltError, match="K=5"):
        package.M2RNNPool.allocate(package.M2RNN(HIDDEN, **sizes, backend="reference", device=device), 4)


def test_compiled_steps(package, device) -> None:
    """A step on a pool is one graph, which writes the pool."""
    layer, x = drawn(package, device), tokens(device, 2)
    pools = [package.M2RNNPool.allocate(layer, 4) for _ in range(2)]
    places = slots(2, -1, device=device)
    step = torch.compile(lambda pool, x: pool.step(x, places), backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        for _ in range(2):
            assert_close({"y": step(pools[0], x)}, {"y": pools[1].step(x, places)}, 1e-6)
    assert_close({"state": pools[0].state}, {"state": pools[1].state}, 1e-6)
