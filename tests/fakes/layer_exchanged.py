"""What one rank does for runtime/test_parallel_tokens.py: tokens that lie over ranks, against the layer on one."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import offsets_of
from interpreter import quicken
from layer import loss_weights
from layer_on_ranks import (
    EXACT,
    HIDDEN,
    KERNELS,
    OPTIONS,
    Block,
    Numerics,
    Subject,
    backward,
    close,
    imported,
    through_kernels,
)  # fmt: skip
from layer_on_ranks import make_layer as any_layer
from layer_on_ranks import tokens as any_tokens
from ranks import serve
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as recomputing
from torch.utils.checkpoint import set_checkpoint_early_stop

from m2gen.bench.ranks.entries import RankCase, Shape
from m2gen.bench.ranks.kinds import Form
from m2gen.bench.ranks.model import parameter_bytes, traffic
from m2gen.bench.ranks.timing import recorded, repeat

BATCH = 2
EACH = 3
"""Tokens of a sequence, or of a packed batch, on each rank."""


def prepare(folder: Path) -> Subject:
    """Import the package that the test wrote."""
    quicken()
    return imported(folder, "on_ranks")


def heads_of(ranks: int, kind: str) -> dict[str, int]:
    """Return heads that fit ``ranks``: operands shared by all, by some, and by none."""
    return {
        "shared": {"q": 1, "k": 1, "v": 2 * ranks, "f": 2 * ranks, "w": 2 * ranks},
        "mixed": {"q": 2 * ranks, "k": ranks, "v": 2 * ranks, "f": ranks, "w": 1, "g": ranks},
        "few": {"q": ranks, "k": 1, "v": ranks, "f": 1, "w": ranks, "g": 1},
        "halves": {"q": 2, "k": 2, "v": 4, "f": 2, "w": 2, "g": 2},
        "kernels": {"q": 1, "k": 1, "v": 4, "f": 4, "w": 4},
    }[kind]


class Whole:
    """The layer on one rank, whose results a rank compares its part with."""

    def __init__(self, subject: Subject, kind: str, how: str, numerics: Numerics = EXACT, **options: Any) -> None:
        self.subject, self.numerics = subject, numerics
        self.layer = any_layer(subject, heads_of(subject.ranks, kind), numerics, **options)
        total = EACH * subject.ranks
        self.packed = how == "packed"
        middle = total // 2 + 1  # within a rank's tokens
        self.call = {"cu_seqlens": offsets_of((middle, 0, total - middle))} if self.packed else {}
        self.x = any_tokens(numerics.dtype, *((total,) if self.packed else (BATCH, total)))
        self.y, self.dx = backward(self.layer, self.x, **self.call)
        self.gradients = {name: p.grad.clone() for name, p in self.layer.named_parameters()}
        self.layer.zero_grad()

    def part(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        """Return this rank's tokens of x."""
        sizes = [EACH] * self.subject.ranks if counts is None else counts
        return x.split(sizes, -2)[self.subject.rank].clone()

    def compare(self, call: Any, counts: list[int] | None = None) -> None:
        """Compare what a call makes of this rank's tokens, and the input's gradient."""
        leaf = self.part(self.x, counts).requires_grad_()
        y = through_kernels(self.subject, self.numerics, partial(call, leaf, **self.call))
        y.backward(self.part(loss_weights(self.y), counts))
        close(y, self.part(self.y, counts), "y", self.numerics)
        close(leaf.grad, self.part(self.dx, counts), "dx", self.numerics)

    def compare_sums(self) -> None:
        """Compare the sums over ranks of the layer's gradients."""
        for name, parameter in self.layer.named_parameters():
            distributed.all_reduce(parameter.grad)
            close(parameter.grad, self.gradients[name], name, self.numerics)

    def compare_shards(self, sharded: nn.Module) -> None:
        """Compare the gradients of a layer whose heads are sharded."""
        with torch.no_grad():
            for parameter in sharded.parameters():
                parameter.copy_(parameter.grad)  # so that gathering the parameters gathers their gradients
        for name, gradient in sharded.gathered_state_dict().items():
            close(gradient, self.gradients[name], name, self.numerics)


def heads(subject: Subject, kind: str, how: str, numerics: Numerics = EXACT, **options: Any) -> None:
    """With tokens sharded outside the layer, heads over ranks give what one rank does."""
    whole = Whole(subject, kind, how, numerics, **options)
    mesh = init_device_mesh("cpu", (subject.ranks,))
    sharded = subject.parallel.HeadParallelM2RNN(whole.layer, mesh, sequence_parallel=True)
    whole.compare(sharded)
    whole.compare_shards(sharded)


def exchange(subject: Subject, kind: str, how: str, numerics: Numerics = EXACT, **options: Any) -> None:
    """Tokens exchanged for heads give what one rank does."""
    whole = Whole(subject, kind, how, numerics, **options)
    whole.compare(partial(subject.parallel.exchange_over_ranks, whole.layer))
    whole.compare_sums()


def uneven(subject: Subject, how: str, kind: str = "shared", numerics: Numerics = EXACT) -> None:
    """Ranks may have other numbers of tokens, one of them none."""
    whole = Whole(subject, kind, how, numerics)
    counts = [0, EACH + 1, *[EACH] * (subject.ranks - 2)]
    counts[-1] += EACH * subject.ranks - sum(counts)
    assert sum(counts) == whole.x.shape[-2]
    whole.compare(partial(subject.parallel.exchange_over_ranks, whole.layer, tokens=counts), counts)
    whole.compare_sums()
    with pytest.raises(ValueError, match=re.escape(f"of rank {subject.rank} as x has, got (1,)")):
        subject.parallel.exchange_over_ranks(whole.layer, whole.part(whole.x, counts), **whole.call, tokens=[1])


def dense_copies(subject: Subject) -> None:
    """A copy in order has the bits of what it is of, whether rows are copied as wide elements or not."""
    collectives = sys.modules[f"{subject.parallel.__name__}.collectives"]
    for columns in (16, 9):
        x = any_tokens(torch.float32, 2, 3, 5).repeat(1, 1, 1, 3)[..., : 2 * columns].bfloat16()
        for view in (x.movedim(2, 0), x[..., columns:], x[..., 1:].movedim(1, 0), x.mT, x):
            found = collectives.dense(view)
            assert found.is_contiguous()
            assert torch.equal(found, view)


class Order(TorchDispatchMode):
    """Notes products and copies in their order, and when messages begin to be sent and are waited for."""

    PRODUCTS = ("mm", "bmm", "addmm_", "baddbmm_")
    COPIES = ("copy_", "clone", "cat", "_to_copy", "stack")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.events: list[str] = []
        self.copied = 0
        begin = distributed.batch_isend_irecv

        def begun(messages: list[Any]) -> list[Any]:
            self.events.append("send")
            return [self, *begin(messages)]

        patch.setattr(distributed, "batch_isend_irecv", begun)

    def wait(self) -> None:
        """Stand among works as one more."""
        self.events.append("wait")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in self.PRODUCTS:
            self.events.append("product")
        elif name in self.COPIES:
            self.events.append("copy")
            self.copied += args[0].numel() if isinstance(args[0], Tensor) else sum(x.numel() for x in args[0])
        return function(*args, **(kwargs or {}))

    def taken(self) -> str:
        """Return the events since the last call."""
        found = " ".join(self.events)
        self.events.clear()
        return found


class Columns:
    """Tokens of all ranks, weights of all ranks' columns, and what one rank makes of them."""

    def __init__(self, subject: Subject, batch: int, counts: list[int], columns: int = 5) -> None:
        self.rank, self.counts = subject.rank, counts
        module = f"{subject.parallel.__name__}."
        self.slabs, self.products = sys.modules[f"{module}slabs"], sys.modules[f"{module}slab_products"]
        self.norm = sys.modules[f"{module}normed"].Normed(subject.ranks * columns, 1e-5)
        self.route = self.slabs.Route(distributed.group.WORLD, tuple(counts))
        self.own = slice(columns * self.rank, columns * (self.rank + 1))
        made = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(2)}
        shape, every = (batch, sum(counts)), subject.ranks * columns
        sizes = ((*shape, HIDDEN), (every, HIDDEN), (every,), (*shape, every), (HIDDEN, every))
        self.x, self.weight, self.bias, self.y, self.back = (torch.randn(*size, **made) for size in sizes)
        self.draws = [torch.randn(*shape, width, **made) for width in (every, HIDDEN)]

    def here(self, x: Tensor) -> Tensor:
        """Return this rank's tokens of x."""
        return x.split(self.counts, 1)[self.rank]

    def compare(self, there: bool, bias: bool = True) -> None:
        """Compare results and gradients of rows that go to heads, or of heads that come back."""
        inputs = [self.x, self.weight, *([self.bias] if bias else [])] if there else [self.y, self.back]
        whole, leaves = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
        draw = self.draws[0 if there else 1]
        own: Callable[[Tensor], Tensor] = self.here if there else (lambda x: x[..., self.own])
        other: Callable[[Tensor], Tensor] = (lambda x: x[..., self.own]) if there else self.here
        expected = nn.functional.linear(*whole) if there else self.normed(*whole)
        first, *rest = leaves
        if there:
            given = self.products.product_to_heads(own(first), *rest, *([] if bias else [None]), self.route)
        else:
            given = self.products.normed_from_heads(own(first), *rest, self.norm, self.route)
        close(given, other(expected), "result")
        expected.backward(draw)
        given.backward(other(draw))
        close(own(leaves[0].grad), own(whole[0].grad), "dx")
        for leaf, full in zip(leaves[1:], whole[1:], strict=True):
            distributed.all_reduce(leaf.grad)
            close(leaf.grad, full.grad, "gradient of a parameter")

    def normed(self, y: Tensor, weight: Tensor) -> Tensor:
        """Return the output projection of the norm."""
        return nn.functional.linear(y * (y.square().mean(-1, keepdim=True) + self.norm.eps).rsqrt(), weight)


def slabs(subject: Subject) -> None:
    """Products that write and read slabs give what one rank does, however many messages there are."""
    even, uneven = [EACH] * subject.ranks, [0, EACH + 1, *[EACH] * (subject.ranks - 2)]
    for batch, counts in ((1, even), (3, even), (3, uneven)):
        for most in (None, 1):
            with pytest.MonkeyPatch.context() as patch:
                columns = Columns(subject, batch, counts)
                if most is not None:
                    patch.setattr(columns.slabs, "MESSAGES", most)
                columns.compare(there=True)
                columns.compare(there=True, bias=False)
                columns.compare(there=False)


def slabs_under_way(subject: Subject) -> None:
    """Products run between the beginning of messages and their arrival, and nothing is copied but what a rank keeps."""
    columns = Columns(subject, 4, [EACH] * subject.ranks)
    kept = columns.here(columns.y)[..., columns.own].numel()
    tokens = columns.here(columns.x).clone().requires_grad_()
    heads = columns.y[..., columns.own].clone().requires_grad_()
    weights = [x.clone().requires_grad_() for x in (columns.weight, columns.back)]
    draws = columns.draws[0][..., columns.own].clone(), columns.here(columns.draws[1]).clone()
    with pytest.MonkeyPatch.context() as patch, Order(patch) as order:
        rows = columns.products.product_to_heads(tokens, weights[0], None, columns.route)
        assert order.taken() == "product send product send product wait wait"
        torch.autograd.grad(rows, (tokens, weights[0]), draws[0])
        assert order.taken() == "send copy product product wait product product"
        y = columns.products.normed_from_heads(heads, weights[1], columns.norm, columns.route)
        assert order.taken() == "send copy product wait product"
        torch.autograd.grad(y, (heads, weights[1]), draws[1])
        assert order.taken() == "product send product send product product product wait wait"
    assert order.copied == 2 * kept


def messages(subject: Subject) -> None:
    """A step of the layer's kernels sends in messages what the model of ``m2gen bench`` says."""
    heads = heads_of(subject.ranks, "kernels")
    layer, ranks = any_layer(subject, heads, KERNELS), subject.ranks
    case = RankCase(Shape("kernels", HIDDEN, 9, 9, {**heads, "g": 4}, "fp32"), Form.EXCHANGE, BATCH, EACH * ranks)
    expected = traffic(case, ranks, fused=True)
    sums = 2 * (ranks - 1) / ranks * parameter_bytes(case.shape)  # of gradients, by whoever calls
    x, call = any_tokens(torch.float32, BATCH, EACH).requires_grad_(), subject.parallel.HeadExchange(layer)
    call(x)  # the first of its kind, which is also compared
    with recorded() as calls:
        through_kernels(subject, KERNELS, partial(call, x)).sum().backward()
    assert {call.name for call in calls} == {"batch_isend_irecv"}
    assert len(calls) == expected.collectives - 1
    assert sum(call.sent_bytes for call in calls) == expected.sent - sums
    repeat(calls)


def both(subject: Subject) -> None:
    """Heads over pairs of ranks, and tokens over the others, give what one rank does."""
    mesh = init_device_mesh("cpu", (2, subject.ranks // 2), mesh_dim_names=("tokens", "heads"))
    for kind, numerics in (("shared", EXACT), ("mixed", EXACT), ("kernels", KERNELS)):
        whole = Whole(subject, kind, "packed", numerics)
        model = nn.ModuleDict({"mixer": whole.layer})
        parallelize_module(model, mesh["heads"], {"mixer": subject.parallel.M2RNNHeads()})
        parallelize_module(model, mesh["tokens"], {"mixer": subject.parallel.M2RNNContext()})
        group, place = mesh["tokens"].get_group(), mesh["tokens"].get_local_rank()
        leaf = whole.x.chunk(2)[place].clone().requires_grad_()
        y = through_kernels(subject, numerics, partial(model["mixer"], leaf, **whole.call))
        y.backward(loss_weights(whole.y).chunk(2)[place])
        close(y, whole.y.chunk(2)[place], "y", numerics)
        close(leaf.grad, whole.dx.chunk(2)[place], "dx", numerics)
        for parameter in model.parameters():
            distributed.all_reduce(parameter.grad.to_local(), group=group)
        whole.compare_shards(model["mixer"])


def style_of_heads(subject: Subject) -> None:
    """``parallelize_module`` shards a model's layers in their place; tokens may be DTensors of any placement."""
    whole = Whole(subject, "shared", "batch")
    mesh = init_device_mesh("cpu", (subject.ranks,))
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(whole.layer)])}).eval()
    seen: list[str] = []
    whole.layer.register_forward_hook(lambda *_: seen.append("hook"))
    style = subject.parallel.M2RNNHeads(sequence_parallel=True, use_local_output=False)
    parallelize_module(model, mesh, {"layers.*.mixer": style})
    mixer = model["layers"][0].mixer
    assert type(mixer) is subject.parallel.HeadParallelM2RNN
    assert (mixer is whole.layer, mixer.training) == (True, False)
    for placement in (Replicate(), Shard(0), Shard(1)):
        found = mixer(distribute_tensor(whole.x, mesh, [placement]))
        assert found.placements == (Shard(1),)
        close(found.full_tensor(), whole.y, str(placement))
    assert len(seen) == 3
    whole.compare(lambda x: mixer(x).to_local())
    whole.compare_shards(mixer)
    for name, given in (("cache", mixer.allocate_cache(BATCH)), ("attention_mask", torch.ones(BATCH, EACH))):
        with torch.no_grad(), pytest.raises(ValueError, match=f"{name} must be None with sequence_parallel"):
            mixer(whole.part(whole.x), **{name: given})
    with pytest.raises(TypeError, match="heads must be of an M2RNN to be sharded, got HeadParallelM2RNN"):
        parallelize_module(mixer, mesh, style)


def style_of_context(subject: Subject, how: str, micro_batches: int | None = None) -> None:
    """``parallelize_module`` lets a model's layers run on tokens that lie over ranks; parameters stay as they were."""
    whole = Whole(subject, "shared", how)
    mesh = init_device_mesh("cpu", (subject.ranks,))
    model = nn.ModuleDict({"mixer": whole.layer})
    names = list(model.state_dict())
    parallelize_module(model, mesh, {"mixer": subject.parallel.M2RNNContext(micro_batches=micro_batches)})
    assert list(model.state_dict()) == names
    whole.compare(model["mixer"])
    whole.compare_sums()
    dim = 0 if whole.packed else 1
    close(model["mixer"](distribute_tensor(whole.x, mesh, [Shard(dim)]), **whole.call), whole.part(whole.y), "y")
    for name, given in (("cache", whole.layer.allocate_cache(BATCH)), ("attention_mask", torch.ones(BATCH, EACH))):
        with pytest.raises(ValueError, match=f"{name} must be None where tokens lie over ranks"):
            model["mixer"](whole.part(whole.x), **{name: given})
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other["mixer"](whole.part(whole.x), **whole.call).any(), "a copy computes with its own parameters"


def recomputed(subject: Subject, early_stop: bool) -> None:
    """Activations of the mixer alone may be recomputed; no rank waits for gradients before it has sent its states."""
    whole = Whole(subject, "shared", "batch")
    scan = partial(subject.parallel.scan_over_ranks, whole.layer, micro_batches=2)
    with set_checkpoint_early_stop(early_stop):
        whole.compare(lambda x: recomputing(scan, x, use_reentrant=False))
    whole.compare_sums()


def compiled(subject: Subject, style: str, kind: str = "shared", numerics: Numerics = EXACT) -> None:
    """``torch.compile`` takes a parallelised layer whole, collectives and gradients included."""
    whole = Whole(subject, kind, "batch", numerics)
    options = {"sequence_parallel": True} if style == "M2RNNHeads" else {}
    mesh = init_device_mesh("cpu", (subject.ranks,))
    parallelize_module(whole.layer, mesh, getattr(subject.parallel, style)(**options))
    whole.compare(torch.compile(whole.layer, backend="aot_eager", fullgraph=True))
    if style == "M2RNNContext":
        whole.compare_sums()
    else:
        whole.compare_shards(whole.layer)


def with_fsdp(subject: Subject, how: str) -> None:
    """``fully_shard`` over the same ranks gathers what the exchange reads, and averages what the ranks contribute."""
    whole = Whole(subject, "shared", how)
    mesh = init_device_mesh("cpu", (subject.ranks,))
    parallelize_module(whole.layer, mesh, subject.parallel.M2RNNContext())
    for module in (whole.layer.input_projection, whole.layer.decay_gate, whole.layer):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    whole.compare(whole.layer)
    for name, parameter in whole.layer.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        close(parameter.grad.full_tensor() * subject.ranks, whole.gradients[name], name)
    alone = any_layer(subject, heads_of(subject.ranks, "shared"), EXACT)
    fully_shard(alone.conv1d, mesh=mesh)
    with pytest.raises(TypeError, match="conv1d must be sharded with its layer"):
        subject.parallel.exchange_over_ranks(alone, whole.part(whole.x), **whole.call)


def heads_with_fsdp(subject: Subject) -> None:
    """``fully_shard`` shards layers whose heads lie over ranks, over others that have other data."""
    whole = Whole(subject, "halves", "batch")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    style = subject.parallel.M2RNNHeads(sequence_parallel=True)
    parallelize_module(whole.layer, mesh["heads"], style)
    fully_shard(whole.layer, mesh=mesh["data"])
    data, place = mesh["data"].get_local_rank(), mesh["heads"].get_local_rank()

    def own(x: Tensor) -> Tensor:
        return x[data : data + 1].chunk(2, 1)[place].clone()

    leaf = own(whole.x).requires_grad_()
    y = whole.layer(leaf)
    y.backward(own(loss_weights(whole.y)))
    close(y, own(whole.y), "y")
    close(leaf.grad, own(whole.dx), "dx")
    whole.layer.reshard()
    with torch.no_grad():
        for parameter in whole.layer.parameters():
            parameter.grad.mul_(2)  # a mean over data
    whole.compare_shards(whole.layer)


def heads_in_bf16(subject: Subject) -> None:
    """Decay parameters over ranks stay float32, as on one: cast, read from a checkpoint, and in mixed precision."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    model = nn.ModuleDict({"mixer": any_layer(subject, heads_of(subject.ranks, "halves"), EXACT).float()})
    parallelize_module(model, mesh["heads"], {"mixer": subject.parallel.M2RNNHeads()})
    gate, wide = model["mixer"].decay_gate, {torch.float32}
    cast = copy.deepcopy(gate).bfloat16()
    assert {p.dtype for p in cast.parameters()} == wide
    cast.load_state_dict({name: x.bfloat16() for name, x in cast.state_dict().items()}, assign=True)
    assert {p.dtype for p in cast.parameters()} == wide
    importlib.import_module(f"{subject.package.__name__}.sharding").fully_shard_decay(model, mesh=mesh["data"])
    fully_shard(model["mixer"], mesh=mesh["data"], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen: set[torch.dtype] = set()
    gate.register_forward_pre_hook(lambda module, _: seen.update(p.dtype for p in module.parameters()))
    assert model["mixer"](any_tokens(torch.float32, BATCH, EACH)).dtype == torch.bfloat16
    assert seen == wide


def errors(subject: Subject) -> None:
    """What does not fit the ranks, was not built, is adapted or spreads tokens is named before anything is sent."""
    other = subject.ranks + 1
    odd = subject.package.M2RNN(HIDDEN, 9, 9, dict.fromkeys("qkvfw", other), backend="reference")
    unbuilt = subject.package.M2RNN(HIDDEN, 16, 16, dict.fromkeys("qkvfw", 2))
    adapted = any_layer(subject, heads_of(subject.ranks, "shared"), EXACT)
    adapted.conv1d = nn.Sequential(adapted.conv1d)
    x = any_tokens(torch.float64, BATCH, EACH)
    message = f"heads of q must divide, or be divided by, {subject.ranks} ranks, got {other}"
    found = [(odd, ValueError, message), (adapted, TypeError, "conv1d must be DepthwiseConv1d to be shared out")]
    if subject.ranks == 2:
        found.append((unbuilt, subject.package.VariantNotBuiltError, "heads: {q: 1, k: 1, v: 1, f: 1, w: 1}"))
    for layer, kind, text in found:
        with pytest.raises(kind, match=re.escape(text)):
            subject.parallel.exchange_over_ranks(layer, x)
    spread = any_layer(subject, heads_of(subject.ranks, "shared"), EXACT)
    mesh = init_device_mesh("cpu", (subject.ranks,))
    inputs = 2 if subject.ranks == 3 else 3
    gated = any_layer(subject, {"q": 1, "k": 1, "v": 12, "f": 12, "w": 12}, EXACT, forget_inputs=inputs)
    fits = f"forget_inputs must divide, or be divided by, {subject.ranks} ranks, got {inputs}"
    with pytest.raises(ValueError, match=fits):
        subject.parallel.exchange_over_ranks(gated, x)
    with pytest.raises(ValueError, match=fits):
        subject.parallel.HeadParallelM2RNN(gated, mesh)
    with pytest.raises(ValueError, match="sequence_parallel must be False where tokens are exchanged"):
        subject.parallel.HeadExchange(subject.parallel.HeadParallelM2RNN(spread, mesh, sequence_parallel=True))
    with pytest.raises(TypeError, match="tokens must be of an M2RNN to lie over ranks, got Linear"):
        parallelize_module(nn.Linear(2, 2), init_device_mesh("cpu", (subject.ranks,)), subject.parallel.M2RNNContext())


def shapes(subject: Subject) -> None:
    """Tokens of another shape, or a copy of offsets without these, are named as a layer on one rank names them."""
    layer, offsets = any_layer(subject, heads_of(subject.ranks, "shared"), EXACT), offsets_of((EACH * subject.ranks,))
    x = any_tokens(torch.float64, BATCH, EACH)
    found: list[tuple[Tensor, dict[str, Tensor], str]] = [
        (x[0], {}, f"x must be (B, S, {HIDDEN}), got ({EACH}, {HIDDEN})"),
        (x[..., 1:], {}, f"x must be (B, S, {HIDDEN}), got ({BATCH}, {EACH}, {HIDDEN - 1})"),
        (x, {"cu_seqlens": offsets}, f"x must be (T, {HIDDEN}), got ({BATCH}, {EACH}, {HIDDEN})"),
        (x, {"cu_seqlens_cpu": offsets}, "cu_seqlens_cpu must come with cu_seqlens"),
    ]
    for given, call, text in found:
        with pytest.raises(ValueError, match=re.escape(text)):
            subject.parallel.exchange_over_ranks(layer, given, **call)


def disagreeing(subject: Subject) -> None:
    """What fails on one rank alone, or sends other messages there, is an error on every rank, which names it."""
    parallel, last, ranks = subject.parallel, subject.ranks - 1, subject.ranks
    agreement = sys.modules[f"{parallel.__name__}.agreement"]
    odd, width = subject.rank == last, 1 + (subject.rank == last)
    layer, hooked = (any_layer(subject, heads_of(ranks, "kernels"), numerics) for numerics in (EXACT, KERNELS))
    if odd:
        hooked.g_norm.register_forward_hook(lambda *_: None)
    mesh, whole = init_device_mesh("cpu", (ranks,)), any_tokens(torch.float64, BATCH, 11)
    sharded = parallel.HeadParallelM2RNN(layer, mesh, sequence_parallel=True)
    exchanged, (x, alone) = partial(parallel.exchange_over_ranks, layer), (whole[:, :width], whole[0, :5])
    few, counts = whole[odd:, :7], (*[7] * last, 6)
    offsets = offsets_of((5 * ranks - odd, *[1] * odd))
    calls: dict[str, Callable[[], object]] = {
        f"got {tuple([2] * ranks)} on rank {last}": partial(exchanged, x),
        f"got [0, {5 * ranks - 1}, {5 * ranks}] on rank {last}": partial(exchanged, alone, cu_seqlens=offsets),
        f"got g_norm on rank {last}": partial(parallel.exchange_over_ranks, hooked, whole[:, :4].float()),
        f"got (2, 2, {HIDDEN}) on rank {last}": partial(sharded, x),
        f"got on rank {last}: M2RNN: tokens must be those": partial(exchanged, whole[:, :7], tokens=counts),
        f"got on rank {last}: M2RNN: micro_batches must be 1": partial(
            parallel.scan_over_ranks, layer, few, micro_batches=BATCH
        ),
    }
    for text, call in calls.items():
        agreement._CALLS.clear()
        own = odd and ": " in text
        with pytest.raises(ValueError if own else parallel.RanksDifferError) as raised:
            call()
        assert (text.partition(": ")[2] if own else text) in str(raised.value)
    for _ in range(2):
        exchanged(whole[:, :7])
    with pytest.MonkeyPatch.context() as patch:  # calls that were alike are not compared again
        patch.setattr(distributed, "all_reduce", None)
        exchanged(whole[:, :7])
        if odd:  # what is wrong on one rank alone later, when others may not ask, is said there at once
            with pytest.raises(ValueError, match="tokens must be those"):
                exchanged(whole[:, :8], tokens=counts)


def style_of_uneven_tokens(subject: Subject) -> None:
    """A DTensor of tokens that ranks do not divide is shared out as torch does it; offsets may be DTensors, too."""
    total, mesh = EACH * subject.ranks + 1, init_device_mesh("cpu", (subject.ranks,))
    layer = any_layer(subject, heads_of(subject.ranks, "shared"), EXACT)
    for how, options in (("batch", {}), ("packed", {}), ("batch", {"micro_batches": 2})):
        packed = how == "packed"
        x = any_tokens(torch.float64, *((total,) if packed else (BATCH, total)))
        offsets = offsets_of((2, 0, total - 2)) if packed else None
        y, dx = backward(layer, x, cu_seqlens=offsets)
        given = distribute_tensor(x, mesh, [Replicate()]).requires_grad_()
        call = {"cu_seqlens": distribute_tensor(offsets, mesh, [Replicate()])} if packed else {}
        model, style = copy.deepcopy(layer), subject.parallel.M2RNNContext(use_local_output=False, **options)
        parallelize_module(model, mesh, style)
        found = copy.deepcopy(model)(given, **call)
        assert found.shape == y.shape
        close(found.full_tensor(), y, "y")
        found.backward(
            distribute_tensor(loss_weights(y), mesh, [Replicate()]).redistribute(placements=found.placements)
        )
        close(given.grad.full_tensor(), dx, "dx")
        local = x.chunk(subject.ranks, -2)
        tokens = tuple(part.shape[-2] for part in local)
        close(model(local[subject.rank], tokens=tokens, **call).full_tensor(), y, "y of parts")
        here = x.split(tokens[::-1], -2)[subject.rank]
        text = f"tokens must be {tokens} without use_local_output, as torch shards them, got {tokens[::-1]}"
        with pytest.raises(ValueError, match=re.escape(text)):
            model(here, tokens=tokens[::-1], **call)
        text = f"none are said, must be {tokens[-1]} as on rank 0"
        with pytest.raises(subject.parallel.RanksDifferError, match=text):
            model(here, **call)
    parallelize_module(layer, mesh, subject.parallel.M2RNNHeads(sequence_parallel=True))
    text = f"tokens of x must be divided by {subject.ranks} ranks with sequence_parallel, got {total}"
    with pytest.raises(ValueError, match=text):
        layer(distribute_tensor(any_tokens(torch.float64, BATCH, total), mesh, [Replicate()]))


def twice(subject: Subject) -> None:
    """Gradients of gradients, for which ranks would have to exchange more, are refused."""
    layer = any_layer(subject, heads_of(subject.ranks, "shared"), EXACT, norm=None)
    mesh = init_device_mesh("cpu", (subject.ranks,))
    sharded = [subject.parallel.HeadParallelM2RNN(copy.deepcopy(layer), mesh, outside) for outside in (False, True)]
    for call in (*sharded, partial(subject.parallel.exchange_over_ranks, layer)):
        x = any_tokens(torch.float64, BATCH, EACH).requires_grad_()
        (gradient,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="trying to differentiate twice"):
            gradient.square().sum().backward()


def frozen(subject: Subject) -> None:
    """A frozen layer on tokens without gradients hands states on without any: no rank waits for them."""
    layer = any_layer(subject, heads_of(subject.ranks, "shared"), EXACT).requires_grad_(False)
    y = subject.parallel.scan_over_ranks(layer, any_tokens(torch.float64, BATCH, EACH))
    assert not y.requires_grad


def checkpoints(subject: Subject, folder: Path, write: bool) -> None:
    """What many ranks wrote, fewer read: the state dict of sharded heads, whatever their number."""
    layer = any_layer(subject, heads_of(subject.ranks, "kernels"), EXACT)
    expected = {name: x.clone() for name, x in layer.state_dict().items()}
    mesh = init_device_mesh("cpu", (subject.ranks, 1), mesh_dim_names=("all", "one"))
    if write:
        sharded = subject.parallel.HeadParallelM2RNN(layer, mesh["all"])
        checkpoint.save(sharded.state_dict(), checkpoint_id=folder)
        return
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    for name in ("all", "one"):
        sharded = subject.parallel.HeadParallelM2RNN(layer, mesh[name])
        read = sharded.state_dict()
        checkpoint.load(read, checkpoint_id=folder)
        sharded.load_state_dict(read)
        for key, x in sharded.gathered_state_dict().items():
            assert torch.equal(x, expected[key]), key


def checks(ranks: int) -> dict[str, Any]:
    """Return the checks for a number of ranks: all of them for two, and what depends on the number for others."""
    hows = ("batch", "packed")
    kinds = {2: ("shared", "mixed", "few"), 3: ("mixed",), 4: ("halves",)}[ranks]
    cases: list[tuple[Any, dict[str, Any]]] = [
        *((call, {"kind": kind, "how": how}) for call in (heads, exchange) for kind in kinds for how in hows),
        *((uneven, {"how": how}) for how in hows),
        (errors, {}),
        (shapes, {}),
        (style_of_uneven_tokens, {}),
        (twice, {}),
        (frozen, {}),
        (dense_copies, {}),
        (slabs, {}),
    ]
    if ranks == 2:
        cases += [(slabs_under_way, {}), (messages, {}), (disagreeing, {})]
        kernels = {"kind": "kernels", "numerics": KERNELS}
        cases += [
            *((call, {**kernels, "how": how}) for call in (heads, exchange) for how in hows),
            *(
                (call, {"kind": "shared", "how": how, **options})
                for call in (heads, exchange)
                for options in OPTIONS.values()
                for how in hows
            ),
            (style_of_heads, {}),
            *((style_of_context, {"how": how}) for how in hows),
            (style_of_context, {"how": "batch", "micro_batches": 2}),
            *((recomputed, {"early_stop": early}) for early in (False, True)),
            *((with_fsdp, {"how": how}) for how in hows),
            *((uneven, {**kernels, "how": how}) for how in hows),
            *((compiled, {"style": style, **how}) for style in ("M2RNNHeads", "M2RNNContext") for how in ({}, kernels)),
        ]
    if ranks == 4:
        kernels = {"kind": "kernels", "numerics": KERNELS}
        cases += [
            (both, {}),
            (disagreeing, {}),
            (heads_with_fsdp, {}),
            (heads_in_bf16, {}),
            (messages, {}),
            *((exchange, {**kernels, "how": how}) for how in hows),
        ]
    return {f"{i} {call.__name__} {options}": partial(call, **options) for i, (call, options) in enumerate(cases)}


if __name__ == "__main__":
    ranks, shared = int(sys.argv[3]), Path(sys.argv[1]).parent / "checkpoint"
    every = checks(ranks)
    if ranks in (2, 4):
        every["checkpoints"] = partial(checkpoints, folder=shared, write=ranks == 4)
    serve(every, prepare)
