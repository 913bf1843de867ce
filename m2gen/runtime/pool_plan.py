"""How the kernels on pools of states are launched: what their module says in its ``LAUNCH``, with types."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple


class PoolPlan(NamedTuple):
    """Everything that launchers must know of a module's kernels on pools."""

    heads: int
    """N, K and V: a slot's state is (heads, rows, cols)."""
    rows: int
    cols: int
    warps: int
    registers: int
    """Registers of a thread for one token at most; 0 leaves them to the compiler."""


@functools.cache
def pool_plan_of(kernels: ModuleType) -> PoolPlan:
    """Return how the kernels of a module are launched."""
    return PoolPlan(**kernels.LAUNCH)
