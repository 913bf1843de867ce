"""Call the operator in tests: results and gradients by name, packed batches, and spies on operators and launchers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from support import OPERANDS
from torch import Tensor

from m2gen.problem import STEPWISE, Inputs

GATE = ("A_log", "dt_bias")
DIFFERENTIABLE = (*OPERANDS, *GATE)
PER_SEQUENCE = ("initial_state", "dstate")
GRADIENTS = tuple(f"d{name}" for name in DIFFERENTIABLE)

Operator = Callable[..., tuple[Tensor, Any]]
Results = dict[str, Tensor]


def module_of(package: ModuleType, name: str) -> ModuleType:
    """Return an imported module of a package."""
    return sys.modules[f"{package.__name__}.{name}"]


def operators_of(package: ModuleType) -> ModuleType:
    """Return the module that serves a package's operators; those beneath it are its attributes."""
    operators: ModuleType = module_of(package, "library").OPERATORS
    return operators


def arguments(inputs: Inputs, names: Iterable[str] = (*DIFFERENTIABLE, "cu_seqlens")) -> dict[str, Tensor]:
    """Return the arguments of ``m2rnn`` by name: the operands that are given."""
    return {name: x for name in names if (x := getattr(inputs, name)) is not None}


def differentiate(operator: Operator, inputs: Inputs, wanted: Iterable[str] | None = None, **options: Any) -> Results:
    """Return y, the final state and the gradients of the operands ``wanted`` (None: all), by name.

    Operands are handed over as they are, strides included; dy and dstate come back in the results' dtypes.
    """
    given = {name: x.detach() for name, x in arguments(inputs).items()}
    leaves = [name for name in given if name in (DIFFERENTIABLE if wanted is None else tuple(wanted))]
    for name in leaves:
        given[name].requires_grad_()
    y, state = operator(**given, **options)
    incoming = [inputs.dy.to(y.dtype), inputs.dstate.to(state.dtype)]
    gradients = torch.autograd.grad([y, state], [given[name] for name in leaves], incoming) if leaves else ()
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}


def changed(inputs: Inputs, names: Iterable[str], change: Callable[[Tensor], Tensor]) -> Inputs:
    """Return the inputs with ``change`` applied to those named ones that are there."""
    present = {name: getattr(inputs, name) for name in names}
    return replace(inputs, **{name: change(x) for name, x in present.items() if x is not None})


def packed(inputs: Inputs, dtype: torch.dtype = torch.int32) -> Inputs:
    """Return (B, S) sequences of one length as a packed batch."""
    batch, steps = inputs.q.shape[:2]
    offsets = torch.arange(batch + 1, device=inputs.q.device, dtype=dtype) * steps
    return replace(changed(inputs, STEPWISE, lambda x: x.flatten(0, 1)), cu_seqlens=offsets)


def spans(inputs: Inputs) -> list[tuple[int, int]]:
    """Return where each sequence of a packed batch starts and ends."""
    assert inputs.cu_seqlens is not None
    return list(pairwise(inputs.cu_seqlens.tolist()))


def alone(inputs: Inputs, index: int) -> Inputs:
    """Return one sequence of a packed batch as a batch of one."""
    start, end = spans(inputs)[index]
    one = changed(inputs, STEPWISE, lambda x: x[start:end].unsqueeze(0))
    return replace(changed(one, PER_SEQUENCE, lambda x: x[index : index + 1]), cu_seqlens=None)


def of_sequence(results: Results, inputs: Inputs, index: int) -> Results:
    """Return one sequence's part of a packed call's results, shaped as a batch of one; not what sequences share."""
    start, end = spans(inputs)[index]
    steps = ("y", *(f"d{name}" for name in STEPWISE))
    states = ("state", "dinitial_state")
    part = {name: results[name][start:end].unsqueeze(0) for name in steps if name in results}
    return part | {name: results[name][index : index + 1] for name in states if name in results}


def offsets_of(lengths: Iterable[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """Return the offsets of packed sequences of these lengths."""
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=dtype)


def assert_same(given: Results, expected: Results) -> None:
    """Fail unless both hold the same names, and every tensor the same bits."""
    assert given.keys() == expected.keys()
    differing = [name for name in given if not same_bits(given[name], expected[name])]
    assert differing == []


def same_bits(given: Tensor, expected: Tensor) -> bool:
    """Say whether two tensors agree in shape, dtype and every bit but those of NaN and of zero's sign."""
    if given.shape != expected.shape or given.dtype != expected.dtype:
        return False
    return bool(((given == expected) | (given.isnan() & expected.isnan())).all())


def assert_close(given: Results, expected: Results, tolerance: float) -> None:
    """Fail unless every tensor's relative error ‖given - expected‖ / ‖expected‖ is at most ``tolerance``."""
    assert given.keys() == expected.keys()
    errors = {name: distance(given[name], expected[name]) for name in given}
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}


def assert_alike(given: Results, expected: Results, device: torch.device) -> None:
    """Fail unless both hold the same bits; on a GPU, where another stride or a fuser orders sums otherwise, 1e-6."""
    assert_close(given, expected, 1e-6) if device.type == "cuda" else assert_same(given, expected)


def distance(given: Tensor, expected: Tensor) -> float:
    """Return ‖given - expected‖ / ‖expected‖ in float64; ‖given‖ where ``expected`` is 0."""
    assert given.shape == expected.shape
    norm = expected.double().norm().item()
    return float((given.double() - expected.double()).norm().item() / (norm or 1.0))


class Spy:
    """Records the calls under a package's ``m2rnn``: of registered operators, and of launchers of kernels."""

    def __init__(self, package: ModuleType, patch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        """Names of the operators that were called, in order."""
        self.launched: list[str] = []
        """Names of the launchers that were called, in order."""
        self.results: dict[str, list[Any]] = {}
        """Results of each operator and launcher, by its name."""
        library = operators_of(package)
        for name in ("FORWARD", "BACKWARD", "STEP"):
            patch.setattr(library, name, self._recording(name, getattr(library, name)))
        launchers = library.launches.launchers
        for name in ("forward", "backward", "step"):
            patch.setattr(launchers, name, self._noting(name, getattr(launchers, name)))

    def _recording(self, name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.names.append(name)
            results = operator(*arguments)
            self.results.setdefault(name, []).append(results)
            return results

        return call

    def _noting(self, name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.launched.append(name)
            results = launcher(*arguments)
            self.results.setdefault(name, []).append(results)
            return results

        return call
