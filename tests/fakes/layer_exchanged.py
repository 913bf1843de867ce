"""What one rank does for runtime/test_parallel_tokens.py: tokens that lie over ranks, against the layer on one."""

from __future__ import annotations

import re
import sys
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
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

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
        subject.parallel.exchange_over_ranks(whole.layer, whole.part(whole.x, counts), tokens=[1])


def dense_copies(subject: Subject) -> None:
    """A copy in order has the bits of what it is of, whether rows are copied as wide elements or not."""
    collectives = sys.modules[f"{subject.parallel.__name__}.collectives"]
    for columns in (16, 9):
        x = any_tokens(torch.float32, 2, 3, 5).repeat(1, 1, 1, 3)[..., : 2 * columns].bfloat16()
        for view in (x.movedim(2, 0), x[..., columns:], x[..., 1:].movedim(1, 0), x.mT, x):
            found = collectives.dense(view)
            assert found.is_contiguous()
            assert torch.equal(found, view)


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


def errors(subject: Subject) -> None:
    """Heads that do not fit the ranks, shares that were not built and adapters are named before anything is sent."""
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
    with pytest.raises(TypeError, match="tokens must be of an M2RNN to lie over ranks, got Linear"):
        parallelize_module(nn.Linear(2, 2), init_device_mesh("cpu", (subject.ranks,)), subject.parallel.M2RNNContext())


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
        (dense_copies, {}),
    ]
    if ranks == 2:
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
            *((with_fsdp, {"how": how}) for how in hows),
            *((uneven, {**kernels, "how": how}) for how in hows),
            *((compiled, {"style": style, **how}) for style in ("M2RNNHeads", "M2RNNContext") for how in ({}, kernels)),
        ]
    if ranks == 4:
        cases += [(both, {}), (heads_with_fsdp, {})]
    return {f"{i} {call.__name__} {options}": partial(call, **options) for i, (call, options) in enumerate(cases)}


if __name__ == "__main__":
    ranks, shared = int(sys.argv[3]), Path(sys.argv[1]).parent / "checkpoint"
    every = checks(ranks)
    if ranks in (2, 4):
        every["checkpoints"] = partial(checkpoints, folder=shared, write=ranks == 4)
    serve(every, prepare)
