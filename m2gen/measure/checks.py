"""Check results against the oracle before anything is timed: the cases, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from m2gen.db import Failure, Reason, TensorError
from m2gen.problem import Gates, Inputs, Problem
from m2gen.variant import Variant
from m2gen.verify import Case, Loss, Oracle, TensorResult, oracle
from m2gen.verify.subject import inputs_of, poisoned

STEPS = 144
"""Steps of the plain problems: more than every checkpoint interval in the search space, and a multiple of 16 as usual
sizes are, since Triton compiles another kernel for strides that are not."""


@dataclass(frozen=True)
class SeededCase:
    """A case with the seed of its inputs."""

    case: Case
    seed: int


def seeded_cases(variant: Variant, steps: int, *, held_out: bool = False) -> tuple[SeededCase, ...]:
    """Return the cases of every trial, or with ``held_out`` those that only finalists get.

    Two are plain calls as they are timed, with incoming gradients within and over the clip bound. The third is a packed
    batch of ragged lengths from initial states, with f near 1 in float32 and a gradient of the final states. Its mean
    length is above a segment's, so that kernels of several segments use them.
    """
    shift = 100 if held_out else 0
    sequences, length = (1, 2 * steps) if held_out else (2, steps)
    plain = Problem(sequences, length)
    lengths = (17, 3 * steps + 5, 0) if held_out else (0, 5, 3 * steps - 1)
    packed = Problem(0, 0, lengths=lengths, initial_state=True)
    return (
        SeededCase(Case("plain", plain, Loss.Y), shift),
        SeededCase(Case("plain_clipped", plain, Loss.Y, dy_scale=3.0), shift + 1),
        SeededCase(Case("packed_slow", packed, Loss.BOTH, gates=Gates.SLOW), shift + 2),
    )


@lru_cache(maxsize=8)
def answered(variant: Variant, asked: SeededCase, device: torch.device) -> tuple[Inputs, Oracle]:
    """Return a case's inputs and the oracle's answer, computed once for all candidates."""
    inputs = inputs_of(variant, asked.case, asked.seed, device)
    return inputs, oracle(variant, asked.case, inputs, asked.seed)


def prepare(variant: Variant, asked: Iterable[SeededCase], device: torch.device) -> None:
    """Compute the oracle's answers before the first candidate needs them."""
    for each in asked:
        answered(variant, each, device)
    with poisoned():  # the first use imports a compiler
        pass


@dataclass(frozen=True)
class Verdict:
    """The worst error of every tensor, and the failure if there is one."""

    errors: tuple[TensorError, ...]
    failure: Failure | None = None


Judge = Callable[[Case, Inputs, Oracle], Iterable[TensorResult]]
"""Runs a candidate on a case's inputs, and judges its results by the oracle."""


def check(variant: Variant, asked: Iterable[SeededCase], judged: Judge, device: torch.device) -> Verdict:
    """Judge every case; the first failure ends the check."""
    return verdict_of(
        (each.case.name, result) for each in asked for result in judged(each.case, *answered(variant, each, device))
    )


def verdict_of(results: Iterable[tuple[str, TensorResult]]) -> Verdict:
    """Return the verdict on results with the names of their cases, up to the first that failed."""
    worst: dict[str, TensorResult] = {}
    for case, result in results:
        if not result.passed:
            message = f"{result.tensor} of {case} {result.verdict}"
            return Verdict(_errors(worst), Failure.of(Reason.WRONG, message))
        if result.budget and (result.tensor not in worst or result.part > worst[result.tensor].part):
            worst[result.tensor] = result
    return Verdict(_errors(worst))


def _errors(worst: dict[str, TensorResult]) -> tuple[TensorError, ...]:
    return tuple(TensorError(name, result.error, result.budget) for name, result in sorted(worst.items()))
