"""How the kernels of a module are launched: what the module says in its ``LAUNCH``, with types."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple


class PerStep(NamedTuple):
    """A result with one row for each step and head, to which one program or several contribute.

    A single contributor stores the row itself. Several add to a float32 row, by atomics, or store a float32 row each,
    head by head and part by part, for the sum kernel to add.
    """

    heads: int
    contributors: int
    dims: tuple[int, ...]
    """Shape of a row; () where it is one number."""


class LaunchPlan(NamedTuple):
    """Everything that launchers must know of a module's kernels; shapes are those of one sequence."""

    computes_gate: bool
    """Whether kernels take A_log and dt_bias."""
    interval: int
    """Steps between checkpoints."""
    checkpoints: str
    """torch's name of the checkpoints' dtype."""
    forward_programs: int
    backward_programs: int
    segments: int
    """Programs that one scan may be cut into; kernels of 1 take no counter of them."""
    shortest_segment: int
    """Steps up to which a scan is one program; 0 where it always is."""
    state: tuple[int, int, int]
    weight: tuple[int, int, int, int]
    """Groups and contributors of the weight's gradient, and a weight."""
    gate: tuple[int, int]
    """Groups and contributors of the gradient of a parameter of the gate."""
    scratch: int
    """float32 elements of a backward program's scratch in global memory; 0 without one."""
    y: PerStep
    dq: PerStep
    dk: PerStep
    dv: PerStep
    df: PerStep
    forward_adds: bool
    """Whether programs add to y by atomics, unless a call asks for determinism."""
    backward_adds: bool
    """Whether programs add to gradients by atomics, unless a call asks for determinism."""
    short: int
    """Tokens up to which no forward adds: a short call's time is the host's, which would clear and round the sums."""
    aligned: bool
    """Whether the backward must know if rows lie on 16 bytes."""
    sum_block: int
    """Elements that a program of the sum kernel adds."""
    forward_options: Mapping[str, int]
    """How Triton compiles and launches all kernels but the backward."""
    backward_options: Mapping[str, int]


PER_STEP = ("y", "dq", "dk", "dv", "df")


_PLANS: dict[ModuleType, LaunchPlan] = {}


def plan_of(kernels: ModuleType) -> LaunchPlan:
    """Return how the kernels of a module are launched, which is read once; a cache of functools takes longer."""
    return _PLANS.get(kernels) or _read(kernels)


def _read(kernels: ModuleType) -> LaunchPlan:
    described = dict(kernels.LAUNCH)
    plan = LaunchPlan(**described | {name: PerStep(*described[name]) for name in PER_STEP})
    _PLANS[kernels] = plan
    return plan
