"""The callables of an implementation: the operator on sequences, and one decoding step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from m2gen.bench import peers
from m2gen.bench.entries import Implementation
from m2gen.bench.kinds import Kind
from m2gen.kernels.compile import load_module
from m2gen.problem import TORCH_DTYPE
from m2gen.runtime.reference import Arithmetic
from m2gen.variant import Variant
from m2gen.verify import Operator
from m2gen.verify.oracle import eager

Stepper = Callable[..., tuple[Tensor, Tensor]]
"""Takes the operands of one token and the state, as ``m2rnn_step`` does; returns y and the new state."""


class CannotServe(Exception):
    """An implementation has no operator for a variant."""


def sequence_operator(implementation: Implementation, variant: Variant) -> Operator:
    """Return the operator on whole sequences; raises CannotServe, or whatever a package or a peer raises."""
    if implementation.kind.generated:
        return partial(package_at(implementation.package).m2rnn, deterministic=False)
    if implementation.kind is Kind.PEER:
        found = peers.operator_of(implementation.source, variant)
        if found is None:
            raise CannotServe(f"{implementation.source} does not serve this variant")
        operator: Operator = found
        return operator
    return _maybe_compiled(implementation, _reference(variant))


def stepper(implementation: Implementation, variant: Variant) -> Stepper:
    """Return the function that advances states by one token; raises CannotServe, or whatever a package raises."""
    if implementation.kind.generated:
        return package_at(implementation.package).m2rnn_step  # type: ignore[no-any-return]
    if implementation.kind is Kind.PEER:
        raise CannotServe("adapters of peers are for sequences")
    reference = _reference(variant)

    def step(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, forget: Tensor, state: Tensor, **gate: Any) -> Any:
        token = [x.unsqueeze(1) for x in (q, k, v)]
        y, after = reference(*token, weight, forget.unsqueeze(1), state, None, clip=None, **gate)
        return y.squeeze(1), after.to(state.dtype)

    return _maybe_compiled(implementation, step)


def stepper_of_several(implementation: Implementation) -> Stepper:
    """Return the function that advances states in slots by several tokens; raises whatever a package raises."""
    return package_at(implementation.package).m2rnn_steps  # type: ignore[no-any-return]


def package_at(folder: Path | None) -> ModuleType:
    """Import the generated package in a folder."""
    assert folder is not None
    return load_module(folder / "__init__.py", f"m2gen_package_{folder.name}")


def _reference(variant: Variant) -> Operator:
    """Return the eager recurrence with a float32 state and products in the variant's dtype."""
    return eager(variant, Arithmetic(torch.float32, TORCH_DTYPE[variant.dtype]))


def _maybe_compiled(implementation: Implementation, call: Callable[..., Any]) -> Callable[..., Any]:
    if implementation.kind is not Kind.COMPILED:
        return call
    torch.compiler.reset()  # all variants share one code object, which dynamo recompiles only so often
    return torch.compile(call, dynamic=False, fullgraph=True)
