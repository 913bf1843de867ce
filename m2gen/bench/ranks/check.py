"""Hold a layer or model over ranks against one rank's in float64, within budgets of one rank's own rounding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from m2gen.bench.ranks.entries import RankCase, Shape
from m2gen.bench.ranks.forms import OverRanks
from m2gen.bench.ranks.hybrid import hybrid, reordered
from m2gen.bench.ranks.kinds import Form

MOST_SEQUENCES = 8
"""Sequences that are checked of larger batches; of smaller ones all, so that schedules are those that are timed."""
TOKENS, TOKENS_OF_MANY = 8, 2
"""Tokens of a sequence on a rank, and on one of ``MANY`` or more: the oracle is a loop in PyTorch."""
MANY = 16
SHUFFLED = 4
"""Draws with the model's width in another order; one more draw is the model as it is, whose rounding ranks share."""
ENDS = ("y", "dx")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def make_model(package: Any, shape: Shape, cuda: bool, seed: int) -> Any:
    """Return the same layer or hybrid on every rank, no parameter of which hides in a one or a zero."""
    device, host = torch.device("cuda" if cuda else "cpu"), torch.device("cpu")
    torch.manual_seed(seed)

    def layer() -> Any:
        made = package.M2RNN(
            shape.hidden_size,
            shape.state_expansion,
            shape.head_dim,
            shape.heads,
            backend="kernels" if cuda else "reference",
            dtype=DTYPES[shape.dtype],
        )
        with torch.no_grad():
            for parameter in (made.D, made.g_norm.weight, made.state_weight):
                parameter.add_(0.1 * torch.randn(parameter.shape))
        return made

    if not shape.blocks:
        return layer().to(device)
    return hybrid(shape.blocks, layer, shape.hidden_size, host, DTYPES[shape.dtype]).to(device)


@dataclass(frozen=True)
class Expected:
    """One rank's results in float64 by tensor, what each may differ by, and the inputs."""

    x: Tensor
    weights: Tensor
    """The gradient of the loss by y."""
    call: dict[str, Tensor]
    exact: dict[str, Tensor]
    budgets: dict[str, float]

    def judged(self, found: OverRanks) -> tuple[float, str]:
        """Return the largest error on any rank, as a fraction of its budget, and the tensor."""
        given = self.results(found)
        errors = {name: _distance(x, self.exact[name]) / self.budgets[name] for name, x in given.items()}
        name = max(errors, key=lambda each: _finite(errors[each]))
        worst: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(worst, (errors[name], name))  # so that ranks agree on what follows
        found_worst: tuple[float, str] = max(worst, key=lambda each: _finite(each[0]))
        return found_worst

    def results(self, found: OverRanks) -> dict[str, Tensor]:
        """Return what the ranks make of x, and all gradients, whole."""
        leaf = found.own(self.x).clone().requires_grad_()
        y = found.call(leaf, **self.call)
        torch.autograd.backward(y, found.own(self.weights))
        found.sum_gradients()
        assert leaf.grad is not None
        return {"y": found.joined(y.detach()), "dx": found.joined(leaf.grad), **found.gradients()}


def checked_size(case: RankCase, ranks: int) -> tuple[int, int]:
    """Return the sequences, as many as a rank has when it is timed up to ``MOST_SEQUENCES``, and all their tokens."""
    if case.form is Form.FSDP:
        return min(case.batch, MOST_SEQUENCES * ranks), TOKENS
    return min(case.batch, MOST_SEQUENCES), (TOKENS if ranks < MANY else TOKENS_OF_MANY) * ranks


def expected(make: Callable[[], Any], case: RankCase, ranks: int, *, packed: bool) -> Expected:
    """Return what one rank gives, whose own errors are the budgets: twice the largest of all draws, and a bit.

    A recurrence may magnify what the same inputs round to, which draws of another order need not show.
    """
    model, shape = make(), case.shape
    device, dtype = next(model.parameters()).device, DTYPES[shape.dtype]
    batch, total = checked_size(case, ranks)
    lead = (batch * total,) if packed else (batch, total)
    generator = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(*lead, shape.hidden_size, generator=generator).to(device, dtype) for _ in range(2))
    middle = batch * total // 2 + 1  # within a rank's tokens
    offsets = torch.tensor([0, middle, middle, batch * total], dtype=torch.int32, device=device)
    call = {"cu_seqlens": offsets} if packed else {}
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
    exact = _trained(twin.double(), x.double(), weights.double(), call)
    worst = dict.fromkeys(exact, 0.0)
    for order in _orders(shape.hidden_size, device):
        back, other = order.argsort(), copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter.copy_(reordered(name, parameter, order))
        results = _trained(other, x[..., order], weights[..., order], call)
        results = {name: x[..., back] if name in ENDS else reordered(name, x, back) for name, x in results.items()}
        worst = {name: max(worst[name], _distance(results[name], exact[name])) for name in exact}
    budgets = {name: 2 * error + torch.finfo(dtype).eps / 2 for name, error in worst.items()}
    return Expected(x, weights, call, exact, budgets)


def _orders(width: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the orders of a model's width that are draws, the first as it is."""
    yield torch.arange(width, device=device)
    for seed in range(SHUFFLED):
        yield torch.randperm(width, generator=torch.Generator().manual_seed(seed)).to(device)


def _finite(error: float) -> float:
    return float("inf") if math.isnan(error) else error


def _trained(layer: Any, x: Tensor, weights: Tensor, call: dict[str, Tensor]) -> dict[str, Tensor]:
    leaf = x.detach().requires_grad_()
    y = layer(leaf, **call)
    gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], weights)
    names = ["dx", *(name for name, _ in layer.named_parameters())]
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


def _distance(given: Tensor, exact: Tensor) -> float:
    if given.shape != exact.shape:
        return math.inf
    norm = exact.double().norm().item()
    return float((given.double() - exact.double()).norm().item() / (norm or 1.0))
