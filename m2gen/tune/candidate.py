"""Load a candidate's kernels, and launch them as the operator does."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType

from torch import Tensor

from m2gen.kernels.compile import load_kernels
from m2gen.kernels.lowering import Lowering
from m2gen.kernels.render import render_kernel
from m2gen.problem import STEPWISE, Inputs, Problem
from m2gen.runtime import launchers
from m2gen.runtime.buffers import Operands
from m2gen.schedule import Schedule
from m2gen.spec import Objective
from m2gen.variant import Variant
from m2gen.verify import OPERANDS

DIFFERENTIABLE = (*OPERANDS[:5], "A_log", "dt_bias", "initial_state")
"""Operands of the launchers that may have a gradient, in order."""


def load(variant: Variant, schedule: Schedule) -> ModuleType:
    """Render and import a candidate's kernels; all processes compile the same cached file."""
    return load_kernels(render_kernel(Lowering(variant, schedule)))


@dataclass(frozen=True)
class KernelCall:
    """A candidate's kernels on the inputs of one problem."""

    module: ModuleType
    inputs: Inputs
    objective: Objective
    clip: float | None = 1.0
    from_state: bool = False
    """Whether the backward gets a gradient of the final state."""

    @property
    def trains(self) -> bool:
        """Whether there is a backward."""
        return self.objective is Objective.TRAIN

    @property
    def _operands(self) -> Operands:
        given = self.inputs
        return given.q, given.k, given.v, given.weight, given.forget, given.A_log, given.dt_bias

    def forward(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return y, the final state and, for training, the checkpoints."""
        inputs, save = self.inputs, self.objective is Objective.TRAIN
        return launchers.forward(self.module, self._operands, inputs.initial_state, inputs.cu_seqlens, save, False)

    def backward(self, saved: Tensor | None) -> list[Tensor]:
        """Return the gradients of the given operands, in the order of ``DIFFERENTIABLE``."""
        assert saved is not None
        inputs, bound = self.inputs, math.inf if self.clip is None else self.clip
        wanted = [getattr(inputs, name) is not None for name in DIFFERENTIABLE]
        dstate = inputs.dstate if self.from_state else None
        return launchers.backward(
            self.module, inputs.dy, dstate, self._operands, saved, inputs.cu_seqlens, bound, wanted, False
        )

    def backward_of(self, results: tuple[Tensor, Tensor, Tensor | None]) -> list[Tensor]:
        """Return the gradients after a forward that gave ``results``."""
        return self.backward(results[2])

    def results(self) -> dict[str, Tensor]:
        """Return y, the state and every gradient by name, for ``m2gen.verify.judge``."""
        y, state, saved = self.forward()
        named = {"y": y, "state": state}
        if self.objective is Objective.TRAIN:
            present = [name for name in DIFFERENTIABLE if getattr(self.inputs, name) is not None]
            named |= {f"d{name}": x for name, x in zip(present, self.backward(saved), strict=True)}
        return named


def blank(inputs: Inputs, problem: Problem) -> Inputs:
    """Return uninitialised inputs of another problem with as many leading dims and the same dtypes."""
    lead = problem.lead

    def of_problem(name: str) -> Tensor:
        x: Tensor = getattr(inputs, name)
        return x.new_empty(*lead, *x.shape[len(lead) :])

    state = inputs.dstate.new_empty(problem.sequences, *inputs.dstate.shape[1:])
    return replace(inputs, **{name: of_problem(name) for name in STEPWISE}, dstate=state)
