"""A layer's step of decoding by one kernel: against float64, its modules, and states that lie anywhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import assert_close, assert_same, distance, module_of
from layer import HIDDEN, PLAIN, tokens, twin
from support import SCHEDULES, build_package, import_package, make_variant
from torch import Tensor, nn

OPTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "biased": {"bias": True},
    "two wide": {"conv_width": 2, "bias": True},
    "three wide": {"conv_width": 3, "activation": None},
    "one wide": {"conv_width": 1},
    "no convolution": {"conv_width": None},
    "bare": {"norm": None, "residual": False},
    "rounded gate": {"round_gate": True},
}
MANY = {"state_expansion": 9, "head_dim": 5, "heads": {"q": 3, "k": 1, "v": 6, "f": 2, "w": 3}}
"""Heads for more than one program of a sequence, the last of them not full, in groups of three sizes."""
SHAPES = {"plain": PLAIN, "many": MANY}
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the package that serves the layers of these tests."""
    folder = tmp_path_factory.mktemp("decoded")
    variants = [
        make_variant(shape["state_expansion"], shape["head_dim"], tuple(shape["heads"].values()), dtype)
        for shape in SHAPES.values()
        for dtype in ("fp32", "bf16")
    ]
    built = build_package("decoded", variants, SCHEDULES["two_level_partial"])
    return import_package(folder / "decoded", built, f"m2gen_test_{folder.name}_decoded")


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


def steps_of(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Return a list to which every call of the step's operator adds its arguments."""
    operators = module_of(package, "library").OPERATORS
    operator, calls = operators.LAYER_STEP, []
    monkeypatch.setattr(operators, "LAYER_STEP", lambda *given: (calls.append(given), operator(*given))[1])
    return calls


def decoded(layer: nn.Module, x: Tensor, cache: Any = None) -> dict[str, Tensor]:
    """Return what tokens give one by one, and what is in the cache then."""
    with torch.no_grad():
        cache = layer.allocate_cache(x.shape[0], device=x.device) if cache is None else cache
        y = torch.cat([layer(x[:, t : t + 1], cache) for t in range(x.shape[1])], 1)
    found = {"y": y, "conv": cache.conv, "state": cache.state}
    return {name: part for name, part in found.items() if part.numel()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tokens_against_float64(package, device, options, shape, monkeypatch) -> None:
    """Outputs and both states are those of the reference in float64, whatever the layer has or lacks."""
    layer, x = drawn(package, shape, **options).to(device), tokens(device, 2, 6)
    calls = steps_of(package, monkeypatch)
    given = decoded(layer, x)
    assert len(calls) == 6
    exact = decoded(twin(layer, torch.float64), x.double())
    errors = {name: distance(given[name], exact[name]) for name in exact}
    assert {name: error for name, error in errors.items() if not error <= 48 * EPS} == {}


def test_bf16_beside_modules(package, device) -> None:
    """With 16 bits, errors against float64 are no larger than where modules round every result between them."""
    totals = {True: 0.0, False: 0.0}
    for seed in range(4):
        layer, x = drawn(package, MANY).to(device, torch.bfloat16), tokens(device, 2, 6, seed=seed).bfloat16()
        exact = decoded(twin(layer, torch.float64), x.double())
        for fused in totals:
            layer.fused = fused
            found = decoded(layer, x)
            totals[fused] += sum(distance(found[name], exact[name]) for name in exact)
    assert totals[True] <= totals[False]


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_sequences_that_a_mask_leaves_out(package, device, state_dtype, monkeypatch) -> None:
    """They stay where they are to the last bit, and give zeros; the others move on as without them."""
    layer, x = drawn(package, MANY).to(device), tokens(device, 3, 4)
    calls, mask = steps_of(package, monkeypatch), torch.tensor([[1], [0], [1]], device=device)
    caches = [layer.allocate_cache(3, device=device, state_dtype=state_dtype) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            layer(x, cache)
        caches[0].state[1], caches[0].conv[1] = torch.nan, torch.nan
        y = layer(tokens(device, 3, 1, seed=2), caches[0], attention_mask=mask)
        expected = layer(tokens(device, 3, 1, seed=2), caches[1])  # as many: products of fewer rows may round otherwise
    assert len(calls) == 2
    assert_same({"y": y[[0, 2]]}, {"y": expected[[0, 2]]})
    assert not y[1].any()
    assert caches[0].state[1].isnan().all()
    assert caches[0].conv[1].isnan().all()
    for name in ("conv", "state"):
        assert_same(*({name: getattr(cache, name)[[0, 2]]} for cache in caches))


def pooled(x: Tensor, slots: Tensor, count: int, *, turned: bool) -> Tensor:
    """Return a pool of NaN but for ``slots``, with a gap between slots, and its last two dims swapped in memory."""
    shape = (*x.shape[1:-2], x.shape[-1], x.shape[-2]) if turned else x.shape[1:]
    pool = x.new_full((count, 2, *shape), torch.nan)[:, 0]
    pool = pool.mT if turned else pool
    pool[slots.long()] = x
    return pool


@pytest.mark.parametrize("turned", [False, True], ids=["taps first", "channels first"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_states_in_pools(package, device, dtype, turned, monkeypatch) -> None:
    """States are read and written where indices say, in pools of any strides; no other slot is touched."""
    layer, x = drawn(package, MANY).to(device), tokens(device, 4, 3)
    calls = steps_of(package, monkeypatch)
    cache = layer.allocate_cache(4, device=device)
    with torch.no_grad():
        layer(x[:, :2], cache)
        before = {"conv": cache.conv.clone(), "state": cache.state.clone()}
        layer(x[:, 2:], cache)
    operator, arguments = module_of(package, "library").LAYER_STEP, list(calls[0])
    with torch.no_grad():
        expected = operator(*arguments[:10], before["conv"].clone(), before["state"].clone(), *arguments[12:])
    source = torch.tensor([5, 2, -1, 0], dtype=dtype, device=device)
    target = torch.tensor([5, 7, 3, -1], dtype=dtype, device=device)
    here = source >= 0
    pools = {name: pooled(part[here], source[here], 9, turned=turned) for name, part in before.items()}
    kept = {name: pool.clone() for name, pool in pools.items()}
    with torch.no_grad():
        found = operator(*arguments[:10], *pools.values(), source, target, *arguments[14:])
    assert_same({"y": found}, {"y": torch.where(here[:, None], expected, 0)})
    for name, pool in pools.items():
        wanted = kept[name]
        wanted[5], wanted[7] = getattr(cache, name)[0], getattr(cache, name)[1]
        assert torch.equal(pool.isnan(), wanted.isnan())
        assert_same({name: pool.nan_to_num()}, {name: wanted.nan_to_num()})


def test_autocast(package, device) -> None:
    """Under autocast, parameters in float32 serve tokens as those of 16 bits would."""
    layer, x = drawn(package).to(device), tokens(device, 2, 3)
    cache = layer.allocate_cache(2, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        found = decoded(layer, x, cache)
    assert found["y"].dtype == torch.bfloat16
    exact = decoded(twin(layer, torch.float64), x.double())
    assert {name for name in exact if distance(found[name], exact[name]) > 2**-6} == set()


def test_a_step_that_fails_behind_its_kernel(package, device, monkeypatch) -> None:
    """Both states go back where something fails after they were written."""
    layer, x = drawn(package).to(device), tokens(device, 2, 4)
    cache = layer.allocate_cache(2, device=device)
    with torch.no_grad():
        layer(x[:, :3], cache)
        before = {"conv": cache.conv.clone(), "state": cache.state.clone()}
        operators = module_of(package, "library").OPERATORS
        operator = operators.LAYER_STEP

        def failing(*arguments: Any) -> Tensor:
            operator(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(operators, "LAYER_STEP", failing)
        with pytest.raises(KeyboardInterrupt):
            layer(x[:, 3:], cache)
    assert_same({"conv": cache.conv, "state": cache.state}, before)


def test_caches_that_do_not_hold_the_inputs(package, device) -> None:
    """A convolution's state narrower than its inputs is refused, as everywhere."""
    layer, x = drawn(package).to(device), tokens(device, 2, 1)
    cache = layer.allocate_cache(2, device=device, dtype=torch.bfloat16)
    with torch.no_grad(), pytest.raises(TypeError, match=r"cache.conv must be torch.float32, as what is convolved is"):
        layer(x, cache)


def test_states_that_share_memory(package, device) -> None:
    """Two states in one memory are an error before either is written."""
    layer, x = drawn(package, conv_width=2).to(device), tokens(device, 2, 1)
    cache = layer.allocate_cache(2, device=device)
    cache.conv = cache.state.view(-1)[: cache.conv.numel()].view_as(cache.conv)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"M2RNN: cache.state and cache.conv: unsupported operation"),
    ):
        layer(x, cache)


def test_the_operator_as_torch_wants_it(package, device, monkeypatch) -> None:
    """The schema says what is written, and fake results are like real ones: torch's own checks of an operator pass."""
    calls = steps_of(package, monkeypatch)
    decoded(drawn(package, bias=True).to(device), tokens(device, 2, 1))
    given = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in calls[0])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(module_of(package, "library").LAYER_STEP, given, test_utils=tests)


def test_compiled_steps(package, device) -> None:
    """A compiled step is one graph that moves the same cache on."""
    layer, x = drawn(package).to(device), tokens(device, 2, 3)
    expected = decoded(layer, x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    cache = layer.allocate_cache(2, device=device)
    with torch.no_grad():
        y = torch.cat([compiled(x[:, t : t + 1], cache) for t in range(3)], 1)
    assert_close({"y": y, "conv": cache.conv, "state": cache.state}, expected, 1e-6)


def _assigned(layer: nn.Module) -> nn.Module:
    layer.load_state_dict({name: x.clone() for name, x in layer.state_dict().items()}, assign=True)
    return layer


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "made": lambda layer: layer,
    "cast": lambda layer: layer.bfloat16(),
    "copied": copy.deepcopy,
    "pickled": lambda layer: pickle.loads(pickle.dumps(layer)),
    "assigned": _assigned,
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_projections_have_room(package, device, move, monkeypatch) -> None:
    """However a layer's parameters came to be, products have aligned rows, and a state dict is the published one."""
    layer = move(drawn(package, MANY, bias=True).to(device))
    projection, calls = layer.input_projection, steps_of(package, monkeypatch)
    assert projection.weight.shape[0] % 16
    x = tokens(device, 2, 1).to(projection.weight.dtype)
    decoded(layer, x)
    decode = module_of(package, "layer_decode")
    found = decode.projected(*calls[0][:3])
    assert found.stride(0) % 16 == 0
    assert_close({"rows": found}, {"rows": projection(x[:, 0])}, 1e-6 if x.dtype == torch.float32 else 2**-8)
    assert layer.state_dict()["input_projection.weight"].shape == projection.weight.shape
    alone = nn.Parameter(projection.weight.detach().clone())
    assert decode.projected(x[:, 0], alone, None).stride(0) == alone.shape[0]
