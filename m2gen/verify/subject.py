"""The context of a check: a package's operator, one case's inputs, and the oracle's results for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from m2gen.problem import Inputs, make_inputs
from m2gen.variant import Variant
from m2gen.verify.case import Case
from m2gen.verify.oracle import OPERANDS, Operator, Oracle, differentiate, gate_of, oracle


class GeneratedPackage(Protocol):
    """A generated package."""

    __name__: str

    @property
    def m2rnn(self) -> Operator: ...
    @property
    def m2rnn_step(self) -> Callable[..., tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class CaseContext:
    """One case on one variant of a package."""

    package: GeneratedPackage
    variant: Variant
    case: Case
    seed: int
    device: torch.device

    @cached_property
    def inputs(self) -> Inputs:
        """The case's operands and incoming gradients, on the device."""
        return inputs_of(self.variant, self.case, self.seed, self.device)

    @property
    def known(self) -> Oracle:
        """The oracle's answer, which is cached for the next case with the same question."""
        return _known(self.variant, self.case.question, self.seed, self.device)

    @property
    def operator(self) -> Operator:
        """The package's operator, in the mode of the case even though ``poisoned`` asks torch for determinism."""
        return partial(self.package.m2rnn, deterministic=self.case.deterministic)

    @property
    def gate(self) -> dict[str, Tensor]:
        """A_log and dt_bias by name if the variant computes its gate, else nothing."""
        return gate_of(self.inputs)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The operator's positional arguments up to cu_seqlens."""
        return (*(getattr(self.inputs, name) for name in OPERANDS), self.inputs.cu_seqlens)

    def submodule(self, name: str) -> ModuleType:
        """Return a module of the package."""
        return importlib.import_module(f"{self.package.__name__}.{name}")

    def differentiate(self, operator: Operator | None = None, **how: Any) -> dict[str, Tensor]:
        """Differentiate ``operator`` (the package's) on the case; see ``m2gen.verify.oracle.differentiate``."""
        with poisoned():
            return differentiate(operator or self.operator, self.inputs, self.case, **how)


def inputs_of(variant: Variant, case: Case, seed: int, device: torch.device) -> Inputs:
    """Draw a case's inputs."""
    return make_inputs(variant, case.problem, seed, case.draw).to(device)


@lru_cache(maxsize=2)
def _known(variant: Variant, question: Case, seed: int, device: torch.device) -> Oracle:
    return oracle(variant, question, inputs_of(variant, question, seed, device), seed)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill uninitialised allocations of torch with NaN, so that an element that is never written is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills memory by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
