"""Weights by hand with which one layer of M2RNN tracks the permutations of a few points, for words of any length.

    m2gen build --spec examples/state_tracking/spec.yaml
    python examples/state_tracking/construct.py --length 65536

A head follows one point. Its state has a unit for each pair (where the point was, where it is): all are -1 but one.
The state weight tells every pair whether the point is at its first place; the letter, whether it takes the first place
to the second; and tanh is their conjunction, 1 where both are so and -1 elsewhere. One row is enough (K = 1), with
V = n^2 columns. Before the first letter the state is 0, so thresholds are such that 0 reads as the head's own point.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from decoder import package_of  # noqa: E402
from words import elements_of, group  # noqa: E402

MARGIN = 8.0
"""How far each pair is from the threshold of its tanh."""


def points_of(name: str) -> int:
    """Return how many points tell a permutation: all but one of a symmetric group, all but two of an alternating."""
    return max(1, int(name[1:]) - (1 if name[0] == "S" else 2))


def dims_of(name: str) -> tuple[int, int, int]:
    """Return K, V and the heads of a layer that tracks a group."""
    return 1, int(name[1:]) ** 2, points_of(name)


@torch.no_grad()
def construct(layer: nn.Module, name: str) -> nn.Module:
    """Write the weights of an M2RNN whose hidden size is the group's order, and dims those of ``dims_of``.

    It takes letters as one-hot vectors, and the largest of its outputs is the product so far.
    """
    elements, degree = elements_of(name), int(name[1:])
    inverse = inverse_silu if layer.activation == "silu" else lambda x: x
    key = 12 * MARGIN if layer.activation == "silu" else 1.0  # so that v is in the range of SiLU
    values = torch.stack([letter_levels(elements, point, degree) for point in range(layer.total_heads)], 1)
    parts = [
        inverse(torch.ones(len(elements), layer.total_heads)),  # q
        inverse(torch.full((len(elements), layer.total_heads), key)),  # k
        inverse(values.flatten(1) / key),  # v
        torch.zeros(len(elements), layer.total_heads),  # the forget gate's input
        inverse_silu(torch.ones(len(elements), layer.total_heads * layer.head_dim)),  # the output gate
    ]
    layer.input_projection.weight.copy_(torch.cat(parts, 1).mT)
    if layer.conv1d is not None:
        layer.conv1d.weight.zero_()[..., -1] = 1
    layer.decay_gate.A_log.zero_()
    layer.decay_gate.dt_bias.fill_(30)  # f = exp(-30): every step forgets
    layer.state_weight.copy_(torch.stack([state_weight(point, degree) for point in range(layer.total_heads)]))
    if layer.D is not None:
        layer.D.zero_()
    agree = torch.tensor([[[p[i] == m for _, m in pairs(degree)] for i in range(layer.total_heads)] for p in elements])
    layer.output_projection.weight.copy_(agree.flatten(1))
    return layer


def pairs(degree: int) -> list[tuple[int, int]]:
    """Return what units stand for: the point was at the first place and is at the second."""
    return list(product(range(degree), repeat=2))


def state_weight(point: int, degree: int, margin: float = MARGIN) -> Tensor:
    """Return W (V, V): whether the point is where the column's pair begins, as 0 or -2 margins.

    For pairs that begin elsewhere than the head's point, whom a state of 0 must read as absent, as 2 margins or 0.
    Whatever letters do to ``degree`` states, this is the weight: letters choose among the pairs.
    """
    units = pairs(degree)
    weight = torch.zeros(len(units), len(units))
    for column, (start, _) in enumerate(units):
        level = degree - 2 if start == point else degree  # a sum of -1s and at most a 1 is -level where it must be 0
        weight[:, column] = -level / (len(units) - 2)  # all units together are 2 - V, which makes that constant
        for row, (_, end) in enumerate(units):
            weight[row, column] += end == start
    return margin * weight


def thresholds(point: int, degree: int) -> list[float]:
    """Return what is added to every pair (V), in margins: a state of 0 reads as the point at its own place."""
    return [0.0 if start == point else -2.0 for start, _ in pairs(degree)]


def letter_levels(elements: list[tuple[int, ...]], point: int, degree: int) -> Tensor:
    """Return v (letters, V): what W's part lacks to be 1 margin above the threshold, or at least 1 below."""
    arrows = torch.tensor([[1.0 if p[start] == end else -1.0 for start, end in pairs(degree)] for p in elements])
    return MARGIN * (arrows + torch.tensor(thresholds(point, degree)))


def inverse_silu(y: Tensor) -> Tensor:
    """Return the x >= -1.2784 whose SiLU is y, which must be above -0.2784: by bisection."""
    low, high = torch.full_like(y, -1.2784, dtype=torch.float64), y.double().abs() + 2
    for _ in range(60):
        middle = (low + high) / 2
        above = F.silu(middle) > y
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return high.to(y.dtype)


@torch.no_grad()
def main() -> None:
    """Ask layers of hand-written weights about long words, and print how much they know."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", default="generated.tracking")
    parser.add_argument("--groups", default="A5,S5")
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--words", type=int, default=16)
    parser.add_argument("--backend", choices=("kernels", "reference"), default="kernels")
    asked = parser.parse_args()
    if min(asked.length, asked.words) < 1:
        parser.error(f"--length and --words must be at least 1, got {asked.length} and {asked.words}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    package = package_of(asked.package)
    print("| group | K | V | heads | dtype | parameters | words | length | right answers |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in asked.groups.split(","):
        problem, (rows, columns, heads) = group(name).to(device), dims_of(name)
        for dtype in (torch.float32, torch.bfloat16):
            layer = package.M2RNN(
                problem.order, rows, columns, dict.fromkeys("qkvfw", heads), backend=asked.backend, device=device
            )
            construct(layer.cpu(), name).to(device, dtype)
            letters, answers = problem.words(asked.words, asked.length, torch.Generator(device).manual_seed(0))
            right = (layer(F.one_hot(letters, problem.order).to(dtype)).argmax(-1) == answers).float().mean().item()
            size = sum(p.numel() for p in layer.parameters())
            facts = name, rows, columns, heads, str(dtype)[6:], f"{size:,}", asked.words, f"{asked.length:,}", right
            print(f"| {' | '.join(map(str, facts))} |")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # a group whose layer is not built
        raise SystemExit(str(error)) from None
