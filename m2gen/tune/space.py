"""The search space: axes, constraints, and every point that satisfies them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from operator import attrgetter
from typing import Any

from m2gen.cache import key_of
from m2gen.kernels.demand import demand_of
from m2gen.kernels.lowering import Direction, Lowering
from m2gen.schedule import FAMILIES, AnySchedule, Part, Reduction, Schedule, Value, default, problems
from m2gen.schedule.layer_knobs import LayerKernel, Tiles
from m2gen.schedule.mma import RESIDENT_WARPS
from m2gen.schedule.tiles import most_warps
from m2gen.spec import Objective
from m2gen.tune.layer.space import enumerate_tiles, tile_space_hash
from m2gen.tune.memory import extra_bytes
from m2gen.tune.subject import Space, Subject
from m2gen.variant import MIN_TILE

Values = dict[str, tuple[Value, ...]]


@dataclass(frozen=True)
class Constraint:
    """A class of points that cannot win, which the validity predicate allows."""

    reason: str
    excludes: Callable[[Subject, Schedule, Direction], bool]


def _part(schedule: Schedule, side: Direction) -> Part:
    return schedule.forward if side is Direction.FORWARD else schedule.backward


def _alone(subject: Subject, schedule: Schedule, side: Direction) -> bool:
    """Whether the kernel has one writer for every element, so that both reductions are the same text."""
    if _part(schedule, side).reduction is Reduction.ATOMIC:
        return False
    k = Lowering(subject.variant, schedule)
    return not any(out.shared for out in ([k.y] if side is Direction.FORWARD else k.gradients))


def _idle(subject: Subject, schedule: Schedule, side: Direction) -> bool:
    part = _part(schedule, side)
    return part.warps > most_warps(subject.variant, part.rows)


def _over_registers(subject: Subject, schedule: Schedule, side: Direction) -> bool:
    """Whether the tiles of states alone take more than twice the registers that a thread can have."""
    demand = demand_of(Lowering(subject.variant, schedule), side, subject.device.warp_size)
    return demand.states > 2 * subject.device.registers


def _at_once(subject: Subject, schedule: Schedule, side: Direction) -> bool:
    """Whether there is no wave after the first, which segments could make shorter."""
    part = _part(schedule, side)
    programs = subject.batch * subject.variant.total_heads * part.parts(subject.variant)
    return schedule.segments > 1 and programs <= subject.device.sm_count * max(1, RESIDENT_WARPS // part.warps)


def _short(subject: Subject, schedule: Schedule, side: Direction) -> bool:
    return schedule.segments > 1 and subject.seq < schedule.segments * schedule.shortest_segment


CONSTRAINTS = (
    Constraint("partial sums of one contributor are the kernel that atomic has", _alone),
    Constraint("a warp has no 16x8 tile of a product of its own", _idle),
    Constraint("tiles of the state take over twice the registers", _over_registers),
    Constraint("segments of programs that the GPU holds all at once", _at_once),
    Constraint("segments of fewer steps than a program should have", _short),
)
MEMORY = "memory over --max-memory"
UNPAIRED = "a forward with slots beside a backward of other tiles"


def space_hash(kernel: LayerKernel | None = None) -> str:
    """Name the declared space of recurrences, or of a kernel: changes with an axis, a value or a constraint."""
    if kernel is not None:
        return tile_space_hash(kernel)
    families = {str(family.__name__): dict(family.AXES) for family in FAMILIES}
    return key_of(repr(families), *(constraint.reason for constraint in CONSTRAINTS))[:12]


def _axes(subject: Subject, family: type[Schedule]) -> Values:
    """Return the axes that matter: inference has no backward and no checkpoint, and few programs make one wave."""
    axes = dict(family.axes(subject.variant, subject.device))
    most = subject.batch * subject.variant.total_heads * (subject.variant.padded_rows // MIN_TILE)
    if "segments" in axes and most <= subject.device.sm_count:
        axes["segments"] = (1,)
    if subject.objective is Objective.INFER:
        usual = family.default(subject.variant, subject.device)
        fixed = ("interval", *(name for name in axes if name.startswith("backward.")))
        axes |= {name: (attrgetter(name)(usual),) for name in fixed}
    return axes


@lru_cache(maxsize=1)
def enumerate_space(subject: Subject) -> Space:
    """Return every point of a subject's space, and how many each constraint excludes."""
    if subject.kernel is not None:
        return enumerate_tiles(subject, subject.kernel)
    products, pruned = dict[str, int](), Counter[str]()
    points: list[Schedule] = []
    for family in FAMILIES:
        if not family.unsupported(subject.variant, subject.device):
            axes = _axes(subject, family)
            products[family.family] = prod(map(len, axes.values()))
            _enumerate(subject, family, axes, points, pruned)
    kept = _within_memory(subject, points)
    if len(kept) != len(points):
        pruned[MEMORY] = len(points) - len(kept)
    return Space(products, kept, dict(pruned))


def _enumerate(
    subject: Subject, family: type[Schedule], axes: Values, points: list[Schedule], pruned: Counter[str]
) -> None:
    """Add a family's points: each kernel is judged beside the least of the other one, which is valid if any is.

    A forward that asks for some backward is judged beside that, and paired with no other.
    """
    least = {name: values[0] for name, values in axes.items()}
    forward_values, backward_values, shared_values = (_product(axes, side) for side in ("forward", "backward", ""))
    for both in shared_values:
        forwards: list[tuple[Any, Mapping[str, Value]]] = []
        for values in forward_values:
            asked = family.beside(values)
            point = family.of({**least, **both, **values, **asked})
            reason = _reason(subject, point, Direction.FORWARD)
            if reason is None:
                forwards.append((point.forward, asked))
            else:
                pruned[reason] += len(backward_values)
        for values in backward_values:
            point = family.of({**least, **both, **values})
            reason = _reason(subject, point, Direction.BACKWARD)
            if reason is None:
                backward: Any = point.backward
                fitting = [forward for forward, asked in forwards if asked.items() <= values.items()]
                points += (family(forward=forward, backward=backward, **both) for forward in fitting)
                pruned[UNPAIRED] += len(forwards) - len(fitting)
            else:
                pruned[reason] += len(forwards)


def _product(axes: Values, side: str) -> list[dict[str, Any]]:
    """Return every combination of the knobs of one kernel, or of those that both have."""
    names = [name for name in axes if name.rpartition(".")[0] == side]
    return [dict(zip(names, values, strict=True)) for values in product(*(axes[name] for name in names))]


def _reason(subject: Subject, schedule: Schedule, side: Direction) -> str | None:
    """Return the first reason why a kernel, beside another that is always valid, is not searched."""
    for problem in problems(subject.variant, schedule, subject.device):
        return problem.split(", got")[0]
    for constraint in CONSTRAINTS:
        if constraint.excludes(subject, schedule, side):
            return constraint.reason
    return None


def fits(subject: Subject, schedule: AnySchedule) -> bool:
    """Whether what a call allocates is within the subject's bound, by arithmetic; tiles decide little of it."""
    return isinstance(schedule, Tiles) or bool(_within_memory(subject, [schedule]))


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
    return subject.times * _taken(subject, default(subject.variant, subject.device, subject.bucket))


def _taken(subject: Subject, schedule: Schedule) -> int:
    training = subject.objective is Objective.TRAIN
    return extra_bytes(Lowering(subject.variant, schedule), subject.batch, subject.seq, training=training)
