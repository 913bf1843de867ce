"""What one rank does for tests/runtime/test_parallel.py: the layer sharded over ranks against the layer on one."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import distance, offsets_of, operators_of
from interpreter import quicken
from layer import loss_weights
from ranks import gathered, serve
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from m2gen.kernels.compile import load_module

HIDDEN = 12
SMS = 12
"""SMs of a GPU whose first bucket few sequences fill: 3 of 2 heads, or 1 of 4 heads."""


@dataclass(frozen=True)
class Numerics:
    """The backend, and its tolerance, since sums over ranks have another order."""

    dtype: torch.dtype
    backend: str
    tolerance: float


EXACT = Numerics(torch.float64, "reference", 1e-12)
KERNELS = Numerics(torch.float32, "kernels", 2e-6)


@dataclass(frozen=True)
class Subject:
    """A package, and how many ranks share the work."""

    package: ModuleType
    parallel: ModuleType
    ranks: int
    rank: int
    split: Subject | None = None
    """The same of the package that has two schedules to choose from."""


def prepare(folder: Path) -> Subject:
    """Import the packages that the test wrote."""
    quicken()
    split = imported(folder, "by_bucket")
    operators_of(split.package).launches.dispatch.device_of = lambda device: ("portable", SMS)
    return replace(imported(folder, "on_ranks"), split=split)


def imported(folder: Path, name: str) -> Subject:
    """Import one of the packages."""
    package = load_module(folder / name / "__init__.py", name)
    parallel = load_module(folder / name / "parallel" / "__init__.py", f"{name}.parallel")
    return Subject(package, parallel, distributed.get_world_size(), distributed.get_rank())


def make_layer(subject: Subject, heads: dict[str, int], numerics: Numerics, **options: Any) -> nn.Module:
    """Return the same layer on every rank, no parameter a one or a zero."""
    torch.manual_seed(0)
    made = {"bias": True, "backend": numerics.backend, "dtype": numerics.dtype, **options}
    layer = subject.package.M2RNN(HIDDEN, 9, 9, heads, **made)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        layer.decay_gate.A_log.sub_(2)
        layer.decay_gate.dt_bias.add_(2)
    return layer


def tokens(dtype: torch.dtype, *lead: int) -> Tensor:
    """Return the same inputs on every rank."""
    return torch.randn(*lead, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(1))


def backward(layer: Callable[..., Tensor], x: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    """Return the output and the gradient of x; parameters have theirs."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf, **call)
    y.backward(loss_weights(y))
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def close(given: Tensor, expected: Tensor, what: str, numerics: Numerics = EXACT) -> None:
    """Fail, naming the tensor, where two are further apart than rounding."""
    found = distance(given, expected)
    assert found <= numerics.tolerance, f"{what}: {found}"


def through_kernels(subject: Subject, numerics: Numerics, call: Callable[[], Any]) -> Any:
    """Return what a call does, which must go by the layer's own kernels unless ``numerics`` are the reference's."""
    operators, calls = operators_of(subject.package), list[None]()
    operator = operators.LAYER
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "LAYER", lambda *arguments: (calls.append(None), operator(*arguments))[1])
        found = call()
    assert bool(calls) == (numerics.backend == "kernels"), f"{len(calls)} calls of the layer's kernels"
    return found


HEADS = {
    "shared_q_k": {"q": 1, "k": 1, "v": 4, "f": 4, "w": 4},
    "sharded_q": {"q": 4, "k": 2, "v": 4, "f": 2, "w": 1, "g": 2},
    "shared_gates": {"q": 2, "k": 1, "v": 2, "f": 1, "w": 4, "g": 1},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "one_forget_input": {"forget_inputs": 1, "activation": "relu"},
    "bare": {"forget_inputs": 2, "activation": None, "conv_width": None, "norm": None, "residual": False},
}
CALLS: dict[str, tuple[tuple[int, ...], dict[str, Tensor]]] = {
    "batch": ((2, 5), {}),
    "packed": ((8,), {"cu_seqlens": offsets_of((5, 0, 3))}),
    "padded": ((3, 4), {"attention_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]])}),
}
"""Shapes of calls: leading dims, and the arguments that say where sequences are."""


def heads_match(
    subject: Subject, heads: dict[str, int], numerics: Numerics, how: str = "batch", **options: Any
) -> None:
    """Compare outputs, the input's gradient and every parameter's gradient with the layer on one rank."""
    mesh = init_device_mesh("cpu", (subject.ranks,))
    whole = make_layer(subject, heads, numerics, **options)
    sharded = subject.parallel.HeadParallelM2RNN(whole, mesh)
    lead, call = CALLS[how]
    x = tokens(numerics.dtype, *lead)
    expected = backward(whole, x, **call)
    given = through_kernels(subject, numerics, partial(backward, sharded, x, **call))
    close(given[0], expected[0], "y", numerics)
    close(given[1], expected[1], "dx", numerics)
    with torch.no_grad():
        for name, parameter in sharded.named_parameters():
            assert isinstance(parameter.grad, DTensor), f"{name}: {type(parameter.grad)}"
            parameter.copy_(parameter.grad)  # so that gathering the parameters gathers their gradients
    for name, gradient in sharded.gathered_state_dict().items():
        close(gradient, whole.get_parameter(name).grad, name, numerics)


def heads_hold_their_share(subject: Subject) -> None:
    """A rank holds its rows of sharded parameters, and gathering gives the layer's own back."""
    mesh = init_device_mesh("cpu", (subject.ranks,))
    layer = make_layer(subject, HEADS["shared_q_k"], EXACT)
    sharded = subject.parallel.HeadParallelM2RNN(layer, mesh)
    held = sum(parameter.to_local().numel() for parameter in sharded.parameters())
    shared = 2 * 9 * (HIDDEN + 1 + 4 + 1)  # q's and k's projection and convolution
    total = sum(parameter.numel() for parameter in layer.parameters())
    assert held == shared + (total - shared) // subject.ranks
    for name, x in sharded.gathered_state_dict().items():
        assert torch.equal(x, layer.state_dict()[name]), name


def heads_in_groups(subject: Subject) -> None:
    """An optimiser's groups have of a sharded layer what they have of the layer, marks or not."""
    layer = make_layer(subject, HEADS["sharded_q"], EXACT)
    sharded = subject.parallel.HeadParallelM2RNN(layer, init_device_mesh("cpu", (subject.ranks,)))

    def sizes(model: nn.Module) -> dict[str, int]:
        groups = subject.package.parameter_groups(model, 0.1)
        return {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}

    assert sizes(sharded) == sizes(layer)
    assert sum(hasattr(p, "_no_weight_decay") for p in sharded.parameters()) > 0
    for parameter in sharded.parameters():
        vars(parameter).pop("_no_weight_decay", None)
    assert sizes(sharded) == sizes(layer)


def heads_decode(subject: Subject, heads: dict[str, int], numerics: Numerics) -> None:
    """Prefill and decoding over ranks give what the whole layer gives in one call."""
    mesh = init_device_mesh("cpu", (subject.ranks,))
    layer = make_layer(subject, heads, numerics)
    sharded = subject.parallel.HeadParallelM2RNN(layer, mesh)
    x = tokens(numerics.dtype, 2, 6)
    with torch.no_grad():
        cache = sharded.allocate_cache(2)
        ends = ((0, 4), (4, 5), (5, 6))
        pieces = through_kernels(subject, numerics, lambda: [sharded(x[:, a:b], cache) for a, b in ends])
        close(torch.cat(pieces, 1), layer(x), "y", numerics)
    assert sharded.allocate_cache(2, state_dtype=torch.bfloat16).state.dtype == torch.bfloat16


def heads_from_states(subject: Subject, how: str) -> None:
    """States go from call to call by the layer's own kernels, and have gradients: results are those of one call."""
    whole = make_layer(subject, HEADS["shared_q_k"], KERNELS)
    sharded = subject.parallel.HeadParallelM2RNN(whole, init_device_mesh("cpu", (subject.ranks,)))
    x = tokens(KERNELS.dtype, *((7,) if how == "packed" else (2, 7)))
    cut, offsets = (4, [offsets_of(part) for part in ((4,), (3,), (7,))]) if how == "packed" else (3, [None] * 3)

    def halves(leaf: Tensor) -> Tensor:
        first, conv, state = sharded.scan(leaf[..., :cut, :], cu_seqlens=offsets[0])
        return torch.cat((first, sharded.scan(leaf[..., cut:, :], conv, state, offsets[1])[0]), -2)

    expected = backward(whole, x, cu_seqlens=offsets[2])
    given = through_kernels(subject, KERNELS, partial(backward, halves, x))
    for what, found, wanted in zip(("y", "dx"), given, expected, strict=True):
        close(found, wanted, what, KERNELS)


def served(subject: Subject, call: Callable[[], Any]) -> list[list[str]]:
    """Return which modules of kernels served a call, in order, on each rank."""
    dispatch = operators_of(subject.package).launches.dispatch
    choose, chosen = dispatch.kernels_for, list[str]()

    def noting(*operands: Any) -> ModuleType:
        kernels: ModuleType = choose(*operands)
        chosen.append(kernels.__name__)
        return kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "kernels_for", noting)
        call()
    return gathered(chosen)


def heads_schedules(subject: Subject) -> None:
    """Ranks run their heads by the same schedule, forward and backward, which is another one for more sequences."""
    layer = make_layer(subject, HEADS["shared_q_k"], KERNELS)
    sharded = subject.parallel.HeadParallelM2RNN(layer, init_device_mesh("cpu", (subject.ranks,)))
    few, many = (served(subject, partial(backward, sharded, tokens(torch.float32, count, 2))) for count in (3, 4))
    for found in (few, many):
        assert found == [[found[0][0]] * 2] * subject.ranks, found
    assert few != many


def sequence_schedules(subject: Subject) -> None:
    """Ranks run each micro-batch by the same schedule, however many of its tokens they hold; sizes decide on it."""
    layer = make_layer(subject, HEADS["shared_q_k"], KERNELS)
    scan = partial(subject.parallel.scan_over_ranks, layer, micro_batches=2)  # of 2 and of 1 sequences
    found = served(subject, partial(backward, scan, tokens(torch.float32, 3, 1 + 2 * subject.rank)))
    assert found == [found[0]] * subject.ranks, found
    more, one = found[0][:2]
    assert found[0][2:] == [one, more]
    assert more != one


def ranks_differ(subject: Subject) -> None:
    """Ranks that would choose other schedules, for their GPUs or packages, are named on every rank, again and again."""
    layer = make_layer(subject, HEADS["shared_q_k"], KERNELS)
    mesh = init_device_mesh("cpu", (subject.ranks,))
    dispatch = importlib.import_module(f"{subject.package.__name__}.dispatch")
    last, name = subject.ranks - 1, dispatch.built.SPACE.name
    for made in (
        lambda: subject.parallel.HeadParallelM2RNN(layer, mesh),
        lambda: subject.parallel.HeadExchange(layer, mesh.get_group()),
        lambda: subject.parallel.scan_over_ranks(layer, tokens(torch.float32, 2, 3)),
        lambda: parallelize_module(layer, mesh, subject.parallel.M2RNNContext(micro_batches=2)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if subject.rank == last:
                patch.setattr(dispatch, "device_of", lambda _: ("portable", 7))
                patch.setattr(dispatch.built, "VARIANTS", {})  # as of a package without the share
            with pytest.raises(subject.parallel.RanksDifferError) as raised:
                made()
        sms = dispatch.device_of(torch.device("cpu"))[1]
        message = f"the same schedules: SMs must be {sms} as on rank 0, got 7 on rank {last}"
        assert str(raised.value) == f"M2RNN: ranks must choose {message}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch.built, "SPACE", ModuleType(f"{name}{subject.rank}"))
        vars(dispatch.built.SPACE)["name"] = f"{name}{subject.rank}"
        with pytest.raises(subject.parallel.RanksDifferError, match=f"got {name}{last} on rank {last}"):
            subject.parallel.check_ranks_agree(mesh.get_group())
    subject.parallel.HeadParallelM2RNN(layer, mesh)
    with pytest.MonkeyPatch.context() as patch:  # those that agreed are not asked again
        patch.setattr(distributed, "all_reduce", None)
        subject.parallel.check_ranks_agree(mesh.get_group())


def heads_errors(subject: Subject) -> None:
    """Heads that do not fit the ranks, shares that were not built, and children that are no longer plain, are named."""
    mesh = init_device_mesh("cpu", (subject.ranks,))
    odd = subject.package.M2RNN(HIDDEN, 9, 9, dict.fromkeys("qkvfw", 3), backend="reference")
    whole = subject.package.M2RNN(HIDDEN, 16, 16, dict.fromkeys("qkvfw", 2))
    adapted, parametrized = (make_layer(subject, HEADS["shared_q_k"], EXACT) for _ in range(2))
    adapted.input_projection = nn.Sequential(adapted.input_projection)
    parametrize.register_parametrization(parametrized.conv1d, "weight", nn.Identity())
    for layer, kind, message in (
        (odd, ValueError, "heads of q must divide, or be divided by, 2 ranks, got 3"),
        (whole, subject.package.VariantNotBuiltError, "heads: {q: 1, k: 1, v: 1, f: 1, w: 1}"),
        (adapted, TypeError, "input_projection must be Linear to be sharded, got Sequential"),
        (parametrized, TypeError, "conv1d must be DepthwiseConv1d to be sharded, got ParametrizedDepthwiseConv1d"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            subject.parallel.HeadParallelM2RNN(layer, mesh)


def sequence_match(subject: Subject, micro_batches: int, numerics: Numerics) -> None:
    """Compare a sequence cut over ranks with it on one: y, dx, and the parameters' gradients summed over ranks."""
    layer = make_layer(subject, HEADS["shared_q_k"], numerics)
    x = tokens(numerics.dtype, 3, 7)
    y, dx = backward(layer, x)
    expected = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    cut = [0, 2, 7]  # shorter than the convolution on the first rank
    start, end = cut[subject.rank], cut[subject.rank + 1]
    leaf = x[:, start:end].clone().requires_grad_()
    scan = partial(subject.parallel.scan_over_ranks, layer, leaf, micro_batches=micro_batches)
    part = through_kernels(subject, numerics, scan)
    part.backward(loss_weights(y)[:, start:end])
    close(part, y[:, start:end], "y", numerics)
    close(leaf.grad, dx[:, start:end], "dx", numerics)
    for name, parameter in layer.named_parameters():
        distributed.all_reduce(parameter.grad)
        close(parameter.grad, expected[name], name, numerics)


def sequence_without_gradients(subject: Subject) -> None:
    """Inference over ranks works, and a batch that is too small is refused before anything is sent."""
    layer = make_layer(subject, HEADS["shared_q_k"], EXACT)
    x = tokens(torch.float64, 2, 6)
    with torch.no_grad():
        part = subject.parallel.scan_over_ranks(layer, x.tensor_split(2, 1)[subject.rank], micro_batches=2)
        close(part, layer(x).tensor_split(2, 1)[subject.rank], "y")
    with pytest.raises(ValueError, match="micro_batches must be 1 to the batch's 2, got 3"):
        subject.parallel.scan_over_ranks(layer, x, micro_batches=3)


class Block(nn.Module):
    """A layer as a model holds it, recomputed in the backward if ``recomputed``."""

    def __init__(self, mixer: nn.Module, recomputed: bool = False) -> None:
        super().__init__()
        self.mixer, self.recomputed = mixer, recomputed
        self.head = nn.Linear(HIDDEN, HIDDEN, dtype=mixer.D.dtype)

    def forward(self, x: Tensor) -> Tensor:
        mixed = checkpoint(self.mixer, x, use_reentrant=False) if self.recomputed else self.mixer(x)
        return self.head(x + mixed)


def fsdp(subject: Subject, children: bool = False) -> None:
    """Under ``fully_shard`` outputs and gradients are those of one rank on the whole batch.

    With ``children`` each child of the layer holds its parameters only while it runs.
    """
    layer = make_layer(subject, HEADS["shared_q_k"], KERNELS)
    torch.manual_seed(7)
    model, whole = Block(layer), Block(make_layer(subject, HEADS["shared_q_k"], KERNELS))
    whole.load_state_dict(model.state_dict())
    x = tokens(torch.float32, 2 * subject.ranks, 4)
    y, dx = backward(whole, x)
    mesh = init_device_mesh("cpu", (subject.ranks,))
    for module in (*(model.mixer.children() if children else ()), model.mixer, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    own = x.tensor_split(subject.ranks)[subject.rank].clone().requires_grad_()
    part = model(own)
    part.backward(loss_weights(y).tensor_split(subject.ranks)[subject.rank])
    close(part, y.tensor_split(subject.ranks)[subject.rank], "y", KERNELS)
    close(own.grad, dx.tensor_split(subject.ranks)[subject.rank], "dx", KERNELS)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert isinstance(parameter.grad, DTensor)
        mean = whole.get_parameter(name).grad / subject.ranks
        close(parameter.grad.full_tensor(), mean, name, KERNELS)


def fsdp_scan(subject: Subject) -> None:
    """``scan`` gathers the layer's own parameters as ``forward`` does; states go on, and have gradients."""
    layer = make_layer(subject, HEADS["shared_q_k"], KERNELS)
    x = tokens(torch.float32, 2, 5)
    expected = backward(layer, x)
    for module in (*layer.children(), layer):
        fully_shard(module, mesh=init_device_mesh("cpu", (subject.ranks,)), reshard_after_forward=True)

    def halves(leaf: Tensor) -> Tensor:
        first, conv, state = layer.scan(leaf[:, :2])
        return torch.cat((first, layer.scan(leaf[:, 2:], conv, state)[0]), 1)

    for what, found, wanted in zip(("y", "dx"), backward(halves, x), expected, strict=True):
        close(found, wanted, what, KERNELS)


def fsdp_in_bf16(subject: Subject) -> None:
    """With mixed precision and recomputed activations, outputs and gradients have the bits of a bf16 layer on one rank.

    Gradients are the mean over ranks of those of each rank's part, in float32.
    """
    torch.manual_seed(7)
    model = Block(make_layer(subject, HEADS["shared_q_k"], KERNELS), recomputed=True)
    narrow = copy.deepcopy(model).bfloat16()
    narrow.recomputed = False
    parts = tokens(torch.float32, subject.ranks, 3).split(1)
    results = []
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for part in parts:
        narrow.zero_grad()
        results.append(backward(narrow, part.bfloat16()))
        for name, parameter in narrow.named_parameters():
            sums[name] += parameter.grad
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (subject.ranks,))
    sharding = importlib.import_module(f"{subject.package.__name__}.sharding")
    sharding.fully_shard_decay(model, mesh=mesh)
    for module in (model.mixer, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    seen = _gate_dtypes(model.mixer)
    y, dx = backward(model, parts[subject.rank])
    expected_y, expected_dx = results[subject.rank]
    assert (y.dtype, dx.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, expected_y)
    assert torch.equal(dx, expected_dx.float())
    assert seen == {torch.float32}
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert torch.equal(parameter.grad.full_tensor(), sums[name] / subject.ranks), name


def _gate_dtypes(mixer: nn.Module) -> set[torch.dtype]:
    """Return a set that is filled with the dtypes which the decay parameters have as the gate runs."""
    seen: set[torch.dtype] = set()
    mixer.decay_gate.register_forward_pre_hook(lambda gate, _: seen.update(p.dtype for p in gate.parameters()))
    return seen


def fsdp_of_a_bf16_layer(subject: Subject) -> None:
    """A bf16 layer, whose decay parameters are float32, is sharded and gathered with all of its values."""
    model = Block(make_layer(subject, HEADS["shared_q_k"], KERNELS)).bfloat16()
    x = tokens(torch.float32, 1, 3).bfloat16()
    expected, _ = backward(model, x)
    logs = model.mixer.decay_gate.A_log.detach().clone()
    mesh = init_device_mesh("cpu", (subject.ranks,))
    importlib.import_module(f"{subject.package.__name__}.sharding").fully_shard_decay(model, mesh=mesh)
    for module in (model.mixer, model):
        fully_shard(module, mesh=mesh)
    seen = _gate_dtypes(model.mixer)
    assert torch.equal(backward(model, x)[0], expected)
    assert seen == {torch.float32}
    assert torch.equal(model.mixer.decay_gate.A_log.full_tensor(), logs)


def fsdp_from_meta(subject: Subject) -> None:
    """A layer made on the meta device, sharded and then drawn has its initial values, the identity sharded too."""
    mesh = init_device_mesh("cpu", (subject.ranks,))
    with torch.device("meta"):
        layer = subject.package.M2RNN(HIDDEN, 9, 9, HEADS["shared_q_k"])
    fully_shard(layer, mesh=mesh)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.state_weight.full_tensor(), torch.eye(9).expand(4, 9, 9))
    A, dt = layer.decay_gate.A_log.full_tensor().exp(), nn.functional.softplus(layer.decay_gate.dt_bias.full_tensor())
    assert bool(((A > 0) & (A <= 16)).all())
    assert bool(((dt >= 1e-3 * 0.999) & (dt <= 0.1 * 1.001)).all())
    assert layer(tokens(torch.float32, 1, 2)).isfinite().all()


CHECKS = {
    "ranks_differ": ranks_differ,
    **{f"heads_{name}": lambda s, heads=heads: heads_match(s, heads, EXACT) for name, heads in HEADS.items()},
    "heads_packed": lambda s: heads_match(s, HEADS["sharded_q"], EXACT, "packed"),
    "heads_padded": lambda s: heads_match(s, HEADS["sharded_q"], EXACT, "padded"),
    **{f"heads_kernels_{how}": lambda s, how=how: heads_match(s, HEADS["shared_q_k"], KERNELS, how) for how in CALLS},
    **{
        f"heads_{name}_{how}": lambda s, how=how, options=options: heads_match(
            s, HEADS["shared_q_k"], EXACT, how, **options
        )
        for name, options in OPTIONS.items()
        for how in ("batch", "packed")
    },
    "heads_hold_their_share": heads_hold_their_share,
    "heads_in_groups": heads_in_groups,
    "heads_decode": lambda s: heads_decode(s, HEADS["sharded_q"], EXACT),
    "heads_decode_kernels": lambda s: heads_decode(s, HEADS["shared_q_k"], KERNELS),
    **{f"heads_from_states_{how}": lambda s, how=how: heads_from_states(s, how) for how in ("batch", "packed")},
    "heads_schedules": lambda s: heads_schedules(s.split),
    "heads_errors": heads_errors,
    **{f"sequence_{count}": lambda s, count=count: sequence_match(s, count, EXACT) for count in (1, 3)},
    "sequence_kernels": lambda s: sequence_match(s, 2, KERNELS),
    "sequence_schedules": lambda s: sequence_schedules(s.split),
    "sequence_without_gradients": sequence_without_gradients,
    "fsdp": fsdp,
    "fsdp_children": lambda s: fsdp(s, children=True),
    "fsdp_scan": fsdp_scan,
    "fsdp_in_bf16": fsdp_in_bf16,
    "fsdp_of_a_bf16_layer": fsdp_of_a_bf16_layer,
    "fsdp_from_meta": fsdp_from_meta,
}

if __name__ == "__main__":
    serve(CHECKS, prepare)
