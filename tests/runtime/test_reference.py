"""The float64 reference against the published equations and a backward derived by hand, in numpy loops."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from m2gen.runtime.reference import EXACT, m2rnn
from m2gen.spec import ClipMode

BATCH, STEPS, ROWS, COLS, HEADS = 2, 6, 5, 3, 4
OPERANDS = ("q", "k", "v", "weight", "forget", "initial_state")
GROUPS = {"none": (4, 4, 4, 4, 4), "q_k": (1, 1, 4, 4, 4), "all": (2, 1, 4, 2, 1), "v_f": (4, 2, 1, 1, 2)}
"""Heads of q, k, v, f and w."""


def draw(groups: tuple[int, ...], steps: int = STEPS, seed: int = 0) -> dict[str, Tensor]:
    """Return float64 operands and incoming gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v, f, w = groups
    return {
        "q": normal(BATCH, steps, q, ROWS),
        "k": normal(BATCH, steps, k, ROWS),
        "v": normal(BATCH, steps, v, COLS),
        "weight": normal(w, COLS, COLS),
        "forget": torch.sigmoid(normal(BATCH, steps, f)),
        "initial_state": normal(BATCH, HEADS, ROWS, COLS),
        "dy": normal(BATCH, steps, HEADS, COLS),
        "dstate": normal(BATCH, HEADS, ROWS, COLS),
    }


@dataclass
class Sequence:
    """One head of one sequence: q, k (S, K), v (S, V), f (S,), W (V, V), the states and the candidates."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    w: np.ndarray
    f: np.ndarray
    states: list[np.ndarray]
    candidates: list[np.ndarray]

    def forward(self) -> np.ndarray:
        """Return y (S, V)."""
        outputs = np.zeros_like(self.v)
        for t in range(len(self.q)):
            before = self.states[-1]
            z = np.tanh(before @ self.w + np.outer(self.k[t], self.v[t]))
            self.candidates.append(z)
            self.states.append(self.f[t] * before + (1 - self.f[t]) * z)
            outputs[t] = self.states[-1].T @ self.q[t]
        return outputs

    def backward(self, dy: np.ndarray, c: np.ndarray, bound: float, clip: str) -> list[np.ndarray]:
        """Return the gradients of q, k, v, W, f and the first state, as the design derives them."""
        dq, dk, dv, dw, df = (np.zeros_like(x) for x in (self.q, self.k, self.v, self.w, self.f))
        for t in reversed(range(len(self.q))):
            before, z = self.states[t], self.candidates[t]
            if clip == "carry":
                g = np.clip(c, -bound, bound) + np.outer(self.q[t], dy[t])
            else:
                g = np.clip(c + np.outer(self.q[t], dy[t]), -bound, bound)
            d = (1 - self.f[t]) * g * (1 - z * z)
            dq[t], dk[t], dv[t] = self.states[t + 1] @ dy[t], d @ self.v[t], d.T @ self.k[t]
            df[t] = (g * (before - z)).sum()
            dw += before.T @ d
            c = self.f[t] * g + d @ self.w.T
        return [dq, dk, dv, dw, df, c]


def _head(x: np.ndarray, n: int, axis: int) -> np.ndarray:
    """Return what head n reads of an operand with fewer heads."""
    return np.take(x, n // (HEADS // x.shape[axis]), axis)


def by_hand(operands: dict[str, Tensor], bound: float, clip: str) -> list[np.ndarray]:
    """Return y, the final state and the gradients of all operands, head by head in numpy."""
    x = {name: value.numpy() for name, value in operands.items()}
    y, last = np.zeros_like(x["dy"]), np.zeros_like(x["dstate"])
    gradients = [np.zeros_like(x[name]) for name in OPERANDS]
    for b in range(BATCH):
        for n in range(HEADS):
            one = [_head(x[name][b], n, 1) for name in ("q", "k", "v")]
            start = [x["initial_state"][b, n]]
            sequence = Sequence(*one, _head(x["weight"], n, 0), _head(x["forget"][b], n, 1), start, [])
            y[b, :, n] = sequence.forward()
            last[b, n] = sequence.states[-1]
            parts = sequence.backward(x["dy"][b, :, n], x["dstate"][b, n], bound, clip)
            _add(gradients, parts, b, n)
    return [y, last, *gradients]


def _add(gradients: list[np.ndarray], parts: list[np.ndarray], b: int, n: int) -> None:
    """Add one head's gradients to those of the groups that it read."""
    for name, total, part in zip(OPERANDS, gradients, parts, strict=True):
        if name == "weight":
            total[n // (HEADS // total.shape[0])] += part
        elif name == "initial_state":
            total[b, n] += part
        else:
            total[b, :, n // (HEADS // total.shape[2])] += part


def by_autograd(operands: dict[str, Tensor], bound: float | None, clip: str) -> list[Tensor]:
    """Return y, the final state and the gradients of all operands, by the reference."""
    leaves = [operands[name].clone().requires_grad_() for name in OPERANDS]
    y, state = m2rnn(*leaves, clip=bound, clamp_total=clip == "total")
    gradients = torch.autograd.grad([y, state], leaves, [operands["dy"], operands["dstate"]])
    return [y.detach(), state.detach(), *gradients]


@pytest.mark.parametrize("clip", ["carry", "total"])
@pytest.mark.parametrize("bound", [0.05, 1.0, 1e9])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_equals_the_published_equations_and_the_derived_backward(groups, bound, clip) -> None:
    """Results and gradients agree to float64 rounding when the bound always, sometimes or never binds."""
    operands = draw(groups)
    for given, expected in zip(by_autograd(operands, bound, clip), by_hand(operands, bound, clip), strict=True):
        np.testing.assert_allclose(given.numpy(), expected, rtol=1e-10, atol=1e-12)


def test_the_two_clip_modes_differ_once_the_bound_binds() -> None:
    """The tests above tell the modes apart: at the bound they differ by tens of percent."""
    operands = draw(GROUPS["none"])
    for far, least in ((0.5, 0.1), (1e9, None)):
        carry, total = (by_autograd(operands, far, clip) for clip in ("carry", "total"))
        differences = [float((a - b).norm() / a.norm()) for a, b in zip(carry[3:], total[3:], strict=True)]
        assert min(differences) > least if least else max(differences) == 0.0


def test_the_first_states_gradient_is_not_clamped() -> None:
    """The first state's gradient may exceed the bound in both modes, since the caller has its own clip."""
    operands = draw(GROUPS["none"], steps=0)
    for clip in ("carry", "total"):
        leaf = operands["initial_state"].clone().requires_grad_()
        _, state = m2rnn(*(operands[name] for name in OPERANDS[:-1]), leaf, clip=1e-3, clamp_total=clip == "total")
        (gradient,) = torch.autograd.grad(state, leaf, operands["dstate"])
        assert torch.equal(gradient, operands["dstate"])


def test_gradients_are_derivatives_when_nothing_clamps() -> None:
    """Without a bound, finite differences agree with autograd."""
    operands = draw((1, 2, 4, 4, 2), steps=3)
    leaves = [operands[name][:1] if name != "weight" else operands[name] for name in OPERANDS]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda *x: m2rnn(*x, clip=None), leaves)


@pytest.mark.parametrize("clip", list(ClipMode))
def test_packed_equals_one_by_one(clip) -> None:
    """A packed batch gives what its sequences give alone, also the empty ones."""
    lengths = (2, 0, 3, 1)
    x = draw(GROUPS["all"])
    flat = {name: x[name][0] for name in ("q", "k", "v", "forget")}
    states = x["initial_state"][:1].repeat(len(lengths), 1, 1, 1) * torch.arange(1.0, 5.0)[:, None, None, None]
    offsets = torch.tensor((0, *lengths)).cumsum(0)
    y, last = m2rnn(
        flat["q"],
        flat["k"],
        flat["v"],
        x["weight"],
        flat["forget"],
        states,
        offsets,
        clip=0.3,
        clamp_total=clip == "total",
    )
    for i, (a, b) in enumerate(pairwise(offsets.tolist())):
        part = [flat[name][a:b].unsqueeze(0) for name in ("q", "k", "v")]
        alone = m2rnn(
            *part,
            x["weight"],
            flat["forget"][a:b].unsqueeze(0),
            states[i : i + 1],
            clip=0.3,
            clamp_total=clip == "total",
        )
        torch.testing.assert_close(y[a:b], alone[0][0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(last[i], alone[1][0], rtol=1e-13, atol=1e-13)


def test_arithmetic_decides_where_it_rounds() -> None:
    """float32 operands computed exactly differ from the same computed in float32, by float32's rounding."""
    operands = [x.float() for name, x in draw(GROUPS["none"]).items() if name in OPERANDS]
    single, double = m2rnn(*operands)[1], m2rnn(*operands, arithmetic=EXACT)[1]
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert 0 < float((single - double).norm() / double.norm()) < 1e-6
