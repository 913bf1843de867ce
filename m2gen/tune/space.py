"""What a search may choose from: the axes, the constraints, and every point that satisfies them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

from m2gen.cache import key_of
from m2gen.device import Device
from m2gen.kernels.demand import demand_of
from m2gen.kernels.lowering import Direction, Lowering
from m2gen.schedule import (
    BackwardSchedule,
    ForwardSchedule,
    Layouts,
    Part,
    Reduction,
    Schedule,
    Scratch,
    Tanh,
    most_warps,
    problems,
)
from m2gen.schedule.heuristic import RESIDENT_WARPS, default
from m2gen.spec import Objective
from m2gen.tune.memory import USUAL, MemoryBound, extra_bytes
from m2gen.variant import MIN_TILE, Variant

Value = int | Reduction | Scratch | Tanh | Layouts

AXES: dict[str, tuple[Value, ...]] = {
    "forward.rows": (16, 32, 64, 128, 256),
    "forward.warps": (1, 2, 4, 8),
    "forward.unroll": (1, 2, 4, 8),
    "forward.reduction": tuple(Reduction),
    "backward.rows": (16, 32, 64, 128, 256),
    "backward.warps": (1, 2, 4, 8),
    "backward.chunk": (1, 2, 4, 8),
    "backward.reduction": tuple(Reduction),
    "backward.scratch": tuple(Scratch),
    "interval": (1, 2, 4, 8, 12, 16, 32, 64, 128),
    "tanh": tuple(Tanh),
    "layouts": tuple(Layouts),
    "segments": (1, 3, 7),
}
"""Every knob of a schedule and the values that are searched; ``m2gen.schedule.problems`` says which combine."""


@dataclass(frozen=True)
class Subject:
    """What is tuned: a variant on a device, on one problem, for one objective."""

    variant: Variant
    device: Device
    objective: Objective
    batch: int
    seq: int
    memory: MemoryBound = USUAL

    @property
    def times(self) -> float | None:
        """How many times the default's memory a call may take; no bound for inference, which keeps nothing after it."""
        return self.memory.times if self.objective is Objective.TRAIN else None


@dataclass(frozen=True)
class Constraint:
    """A class of points that cannot win, which the validity predicate allows."""

    reason: str
    excludes: Callable[[Subject, Schedule, Part], bool]


def _alone(subject: Subject, schedule: Schedule, part: Part) -> bool:
    """Whether the kernel has one writer for every element, so that both reductions are the same text."""
    if part.reduction is Reduction.ATOMIC:
        return False
    if isinstance(part, ForwardSchedule):
        return not Lowering(subject.variant, schedule).y.shared
    return not any(out.shared for out in Lowering(subject.variant, schedule).gradients)


def _idle(subject: Subject, schedule: Schedule, part: Part) -> bool:
    return part.warps > most_warps(subject.variant, part)


def _over_registers(subject: Subject, schedule: Schedule, part: Part) -> bool:
    """Whether the tiles of states alone take more than twice the registers that a thread can have."""
    device = subject.device
    direction = Direction.FORWARD if isinstance(part, ForwardSchedule) else Direction.BACKWARD
    demand = demand_of(Lowering(subject.variant, schedule), direction, device.warp_size)
    return demand.states > 2 * device.registers


def _at_once(subject: Subject, schedule: Schedule, part: Part) -> bool:
    """Whether there is no turn after the first, which segments could make shorter."""
    programs = subject.batch * subject.variant.total_heads * part.parts(subject.variant)
    return schedule.segments > 1 and programs <= subject.device.sm_count * max(1, RESIDENT_WARPS // part.warps)


def _short(subject: Subject, schedule: Schedule, part: Part) -> bool:
    return schedule.segments > 1 and subject.seq < schedule.segments * schedule.shortest_segment


CONSTRAINTS = (
    Constraint("partial sums of one contributor are the kernel that atomic has", _alone),
    Constraint("a warp has no 16x8 tile of a product of its own", _idle),
    Constraint("tiles of the state take over twice the registers", _over_registers),
    Constraint("segments of programs that the GPU holds all at once", _at_once),
    Constraint("segments of fewer steps than a program should have", _short),
)
MEMORY = "memory over --max-memory"


@dataclass(frozen=True)
class Space:
    """The points of a subject's space in a fixed order, and why the others are none."""

    size: int
    """Points of the product of all axes."""
    points: tuple[Schedule, ...]
    pruned: dict[str, int]
    """How many points each reason excludes; a point counts for the first that does."""


def space_hash() -> str:
    """Name the declared space: changes with an axis, a value or a constraint."""
    return key_of(repr(AXES), *(constraint.reason for constraint in CONSTRAINTS))[:12]


def _axes(subject: Subject) -> dict[str, tuple[Value, ...]]:
    """Return the axes that matter: inference has no backward and no checkpoint, and few programs take no turns."""
    most = subject.batch * subject.variant.total_heads * (subject.variant.padded_rows // MIN_TILE)
    axes = AXES if most > subject.device.sm_count else {**AXES, "segments": (1,)}
    if subject.objective is Objective.TRAIN:
        return axes
    fixed = values_of(default(subject.variant, subject.device))
    return {
        name: values if name.startswith("forward.") or name in ("tanh", "layouts", "segments") else (fixed[name],)
        for name, values in axes.items()
    }


def values_of(schedule: Schedule) -> dict[str, Value]:
    """Return a schedule as a value for each axis."""
    forward, backward = schedule.forward, schedule.backward
    return {
        "forward.rows": forward.rows,
        "forward.warps": forward.warps,
        "forward.unroll": forward.unroll,
        "forward.reduction": forward.reduction,
        "backward.rows": backward.rows,
        "backward.warps": backward.warps,
        "backward.chunk": backward.chunk,
        "backward.reduction": backward.reduction,
        "backward.scratch": backward.scratch,
        "interval": schedule.interval,
        "tanh": schedule.tanh,
        "layouts": schedule.layouts,
        "segments": schedule.segments,
    }


def schedule_of(values: Mapping[str, Any]) -> Schedule:
    """Return the schedule that has a value for each axis."""
    parts = {
        side: [value for name, value in values.items() if name.startswith(side)] for side in ("forward", "backward")
    }
    forward, backward = ForwardSchedule(*parts["forward"]), BackwardSchedule(*parts["backward"])
    return Schedule(forward, backward, values["interval"], values["tanh"], values["layouts"], values["segments"])


@lru_cache(maxsize=1)
def enumerate_space(subject: Subject) -> Space:
    """Return every point of a subject's space, and how many each constraint excludes."""
    axes = _axes(subject)
    shared = _shared(subject, axes)
    size = len(shared)
    for name, values in axes.items():
        size *= len(values) if "." in name else 1
    pruned: Counter[str] = Counter()
    backward_count = _count(axes, "backward.")
    points: list[Schedule] = []
    for both in shared:
        first, other = _least(both[2])
        forwards: list[ForwardSchedule] = []
        for forward in (ForwardSchedule(*v) for v in _product(axes, "forward.")):  # type: ignore[arg-type]
            reason = _reason(subject, Schedule(forward, other, *both), forward)
            if reason is None:
                forwards.append(forward)
            else:
                pruned[reason] += backward_count
        for backward in _backwards(subject, axes, both[2]):
            reason = _reason(subject, Schedule(first, backward, *both), backward)
            if reason is None:
                points += (Schedule(forward, backward, *both) for forward in forwards)
            else:
                pruned[reason] += len(forwards)
    kept = _within_memory(subject, points)
    if len(kept) != len(points):
        pruned[MEMORY] = len(points) - len(kept)
    return Space(size, kept, dict(pruned))


def _shared(subject: Subject, axes: dict[str, tuple[Value, ...]]) -> list[tuple[int, Tanh, Layouts, int]]:
    """Return what both kernels have alike; for inference, which saves none, the default's checkpoints."""
    both = list(product(axes["interval"], axes["tanh"], axes["layouts"], axes["segments"]))
    if subject.objective is Objective.INFER:
        usual = default(subject.variant, subject.device)
        both = [(usual.laid_out(layouts).interval, tanh, layouts, cut) for _, tanh, layouts, cut in both]  # type: ignore[arg-type]
    return both  # type: ignore[return-value]


def _least(layouts: Layouts) -> tuple[ForwardSchedule, BackwardSchedule]:
    """Return kernels that are valid with these layouts wherever any are, to ask about the other one of the two."""
    small = Schedule(
        ForwardSchedule(MIN_TILE, 1, 1, Reduction.ATOMIC),
        BackwardSchedule(MIN_TILE, 1, 1, Reduction.ATOMIC),
        interval=1,
        tanh=Tanh.EXP,
    ).laid_out(layouts)
    return small.forward, small.backward


def _backwards(subject: Subject, axes: dict[str, tuple[Value, ...]], layouts: Layouts) -> list[BackwardSchedule]:
    """Return what the backward may be with these layouts: for inference, which runs none, the default's."""
    if subject.objective is Objective.INFER:
        return [default(subject.variant, subject.device).laid_out(layouts).backward]
    return [BackwardSchedule(*values) for values in _product(axes, "backward.")]  # type: ignore[arg-type]


def _product(axes: dict[str, tuple[Value, ...]], prefix: str) -> Iterator[tuple[Value, ...]]:
    return product(*(values for name, values in axes.items() if name.startswith(prefix)))


def _count(axes: dict[str, tuple[Value, ...]], prefix: str) -> int:
    return sum(1 for _ in _product(axes, prefix))


def _reason(subject: Subject, schedule: Schedule, part: Part) -> str | None:
    """Return the first reason why a part, beside another that is always valid, is not searched."""
    for problem in problems(subject.variant, schedule, subject.device):
        return problem.split(", got")[0]
    for constraint in CONSTRAINTS:
        if constraint.excludes(subject, schedule, part):
            return constraint.reason
    return None


def fits(subject: Subject, schedule: Schedule) -> bool:
    """Whether what a call allocates is within the subject's bound, by arithmetic."""
    return bool(_within_memory(subject, [schedule]))


def _within_memory(subject: Subject, points: Iterable[Schedule]) -> tuple[Schedule, ...]:
    """Return the points within the subject's bound; of the many that take the same memory, one is worked out."""
    limit = _limit(subject)
    if limit is None:
        return tuple(points)
    known: dict[object, bool] = {}

    def within(point: Schedule) -> bool:
        forward, backward = point.forward, point.backward
        of_backward = backward.rows, backward.reduction, backward.chunk, backward.scratch
        facts = forward.rows, forward.reduction, of_backward, point.interval, point.segments
        if facts not in known:
            known[facts] = _taken(subject, point) <= limit
        return known[facts]

    return tuple(point for point in points if within(point))


def _limit(subject: Subject) -> float | None:
    if subject.memory.size is not None or subject.times is None:
        return subject.memory.size
    return subject.times * _taken(subject, default(subject.variant, subject.device))


def _taken(subject: Subject, schedule: Schedule) -> int:
    training = subject.objective is Objective.TRAIN
    return extra_bytes(Lowering(subject.variant, schedule), subject.batch, subject.seq, training=training)
