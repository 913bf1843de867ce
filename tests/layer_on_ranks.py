"""What one rank does for tests/test_parallel.py: the layer sharded over ranks against the layer on one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from calls import distance
from interpreter import quicken
from ranks import serve
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from m2gen.compile import load_module

HIDDEN = 12
TOLERANCE = 1e-12
"""Of float64 on the reference backend: sums over ranks are in another order."""
KERNEL_TOLERANCE = 2e-6


@dataclass(frozen=True)
class Subject:
    """A package, and how many ranks share the work."""

    package: ModuleType
    parallel: ModuleType
    ranks: int
    rank: int


def prepare(folder: Path) -> Subject:
    """Import the package that the test wrote."""
    quicken()
    package = load_module(folder / "package" / "__init__.py", "on_ranks")
    parallel = load_module(folder / "package" / "parallel.py", "on_ranks.parallel")
    return Subject(package, parallel, distributed.get_world_size(), distributed.get_rank())


def make_layer(subject: Subject, heads: dict[str, int], dtype: torch.dtype, backend: str = "reference") -> nn.Module:
    """Return the same layer on every rank, no parameter a one or a zero."""
    torch.manual_seed(0)
    layer = subject.package.M2RNN(HIDDEN, 9, 9, heads, bias=True, backend=backend, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        layer.decay_gate.A_log.sub_(2)
        layer.decay_gate.dt_bias.add_(2)
    return layer


def tokens(dtype: torch.dtype, *lead: int) -> Tensor:
    """Return the same inputs on every rank."""
    return torch.randn(*lead, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(1))


def backward(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the gradient of x; parameters have theirs."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos())
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def close(given: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Fail, naming the tensor, where two are further apart than rounding."""
    found = distance(given, expected)
    assert found <= tolerance, f"{what}: {found}"


HEADS = {
    "shared_q_k": {"q": 1, "k": 1, "v": 4, "f": 4, "w": 4},
    "sharded_q": {"q": 4, "k": 2, "v": 4, "f": 2, "w": 1, "g": 2},
    "shared_gates": {"q": 2, "k": 1, "v": 2, "f": 1, "w": 4, "g": 1},
}


def heads_match(subject: Subject, heads: dict[str, int], dtype: torch.dtype, backend: str, tolerance: float) -> None:
    """Compare outputs, the input's gradient and every parameter's gradient with the layer on one rank."""
    mesh = init_device_mesh("cpu", (subject.ranks,))
    whole = make_layer(subject, heads, dtype, backend)
    sharded = subject.parallel.HeadParallelM2RNN(whole, mesh)
    x = tokens(dtype, 2, 5)
    expected, given = backward(whole, x), backward(sharded, x)
    close(given[0], expected[0], "y", tolerance)
    close(given[1], expected[1], "dx", tolerance)
    with torch.no_grad():
        for name, parameter in sharded.named_parameters():
            assert isinstance(parameter.grad, DTensor), f"{name}: {type(parameter.grad)}"
            parameter.copy_(parameter.grad)  # so that gathering the parameters gathers their gradients
    for name, gradient in sharded.gathered_state_dict().items():
        close(gradient, whole.get_parameter(name).grad, name, tolerance)


def heads_kernels(subject: Subject) -> None:
    """The same on the kernels of each rank's share of the heads, in float32."""
    heads_match(subject, HEADS["shared_q_k"], torch.float32, "kernels", KERNEL_TOLERANCE)


def heads_hold_their_share(subject: Subject) -> None:
    """A rank holds its rows of sharded parameters, and gathering gives the layer's own back."""
    mesh = init_device_mesh("cpu", (subject.ranks,))
    layer = make_layer(subject, HEADS["shared_q_k"], torch.float64)
    sharded = subject.parallel.HeadParallelM2RNN(layer, mesh)
    held = sum(parameter.to_local().numel() for parameter in sharded.parameters())
    shared = 2 * 9 * (HIDDEN + 1 + 4 + 1)  # q's and k's projection and convolution
    total = sum(parameter.numel() for parameter in layer.parameters())
    assert held == shared + (total - shared) // subject.ranks
    for name, x in sharded.gathered_state_dict().items():
        assert torch.equal(x, layer.state_dict()[name]), name


def heads_decode(subject: Subject) -> None:
    """Prefill and decoding over ranks give what the whole layer gives in one call."""
    mesh = init_device_mesh("cpu", (subject.ranks,))
    layer = make_layer(subject, HEADS["sharded_q"], torch.float64)
    sharded = subject.parallel.HeadParallelM2RNN(layer, mesh)
    x = tokens(torch.float64, 2, 6)
    with torch.no_grad():
        cache = sharded.allocate_cache(2)
        pieces = [sharded(x[:, a:b], cache) for a, b in ((0, 4), (4, 5), (5, 6))]
        close(torch.cat(pieces, 1), layer(x), "y")


def heads_errors(subject: Subject) -> None:
    """Heads that do not fit the ranks, and shares that were not built, are named."""
    mesh = init_device_mesh("cpu", (subject.ranks,))
    odd = subject.package.M2RNN(HIDDEN, 9, 9, dict.fromkeys("qkvfw", 3), backend="reference")
    whole = subject.package.M2RNN(HIDDEN, 16, 16, dict.fromkeys("qkvfw", 2))
    for layer, kind, message in (
        (odd, ValueError, "heads of q must divide, or be divided by, 2 ranks, got 3"),
        (whole, subject.package.VariantNotBuiltError, "heads: {q: 1, k: 1, v: 1, f: 1, w: 1}"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            subject.parallel.HeadParallelM2RNN(layer, mesh)


def sequence_match(subject: Subject, micro_batches: int, dtype: torch.dtype, backend: str, tolerance: float) -> None:
    """Compare a sequence cut over ranks with it on one: y, dx, and the parameters' gradients summed over ranks."""
    layer = make_layer(subject, HEADS["shared_q_k"], dtype, backend)
    x = tokens(dtype, 3, 7)
    y, dx = backward(layer, x)
    expected = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    cut = [0, 2, 7]  # shorter than the convolution on the first rank
    start, end = cut[subject.rank], cut[subject.rank + 1]
    leaf = x[:, start:end].clone().requires_grad_()
    part = subject.parallel.scan_over_ranks(layer, leaf, micro_batches=micro_batches)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos()
    part.backward(weights[:, start:end])
    close(part, y[:, start:end], "y", tolerance)
    close(leaf.grad, dx[:, start:end], "dx", tolerance)
    for name, parameter in layer.named_parameters():
        distributed.all_reduce(parameter.grad)
        close(parameter.grad, expected[name], name, tolerance)


def sequence_kernels(subject: Subject) -> None:
    """The same on kernels, in float32."""
    sequence_match(subject, 2, torch.float32, "kernels", KERNEL_TOLERANCE)


def sequence_without_gradients(subject: Subject) -> None:
    """Inference over ranks works, and a batch that is too small is refused before anything is sent."""
    layer = make_layer(subject, HEADS["shared_q_k"], torch.float64)
    x = tokens(torch.float64, 2, 6)
    with torch.no_grad():
        part = subject.parallel.scan_over_ranks(layer, x.tensor_split(2, 1)[subject.rank], micro_batches=2)
        close(part, layer(x).tensor_split(2, 1)[subject.rank], "y")
    with pytest.raises(ValueError, match="micro_batches must be 1 to the batch's 2, got 3"):
        subject.parallel.scan_over_ranks(layer, x, micro_batches=3)


class Block(nn.Module):
    """A layer as a model holds it."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.head = nn.Linear(HIDDEN, HIDDEN, dtype=mixer.D.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.mixer(x))


def fsdp(subject: Subject) -> None:
    """Under ``fully_shard`` outputs and gradients are those of one rank on the whole batch."""
    layer = make_layer(subject, HEADS["shared_q_k"], torch.float32, "kernels")
    torch.manual_seed(7)
    model, whole = Block(layer), Block(make_layer(subject, HEADS["shared_q_k"], torch.float32, "kernels"))
    whole.load_state_dict(model.state_dict())
    x = tokens(torch.float32, 2 * subject.ranks, 4)
    y, dx = backward(whole, x)
    mesh = init_device_mesh("cpu", (subject.ranks,))
    fully_shard(model.mixer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    own = x.tensor_split(subject.ranks)[subject.rank].clone().requires_grad_()
    part = model(own)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos()
    part.backward(weights.tensor_split(subject.ranks)[subject.rank])
    close(part, y.tensor_split(subject.ranks)[subject.rank], "y", KERNEL_TOLERANCE)
    close(own.grad, dx.tensor_split(subject.ranks)[subject.rank], "dx", KERNEL_TOLERANCE)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert isinstance(parameter.grad, DTensor)
        mean = whole.get_parameter(name).grad / subject.ranks
        close(parameter.grad.full_tensor(), mean, name, KERNEL_TOLERANCE)


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
    **{
        f"heads_{name}": lambda s, heads=heads: heads_match(s, heads, torch.float64, "reference", TOLERANCE)
        for name, heads in HEADS.items()
    },
    "heads_kernels": heads_kernels,
    "heads_hold_their_share": heads_hold_their_share,
    "heads_decode": heads_decode,
    "heads_errors": heads_errors,
    **{
        f"sequence_{count}": lambda s, count=count: sequence_match(s, count, torch.float64, "reference", TOLERANCE)
        for count in (1, 3)
    },
    "sequence_kernels": sequence_kernels,
    "sequence_without_gradients": sequence_without_gradients,
    "fsdp": fsdp,
    "fsdp_from_meta": fsdp_from_meta,
}

if __name__ == "__main__":
    serve(CHECKS, prepare)
