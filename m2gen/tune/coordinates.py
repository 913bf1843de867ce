"""Schedules as places on axes, for samplers and statistics of every family, and tiles of kernels likewise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from m2gen.schedule import FAMILIES, AnySchedule, Family, Value
from m2gen.schedule.layer_knobs import LayerKernel, Tiles

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Coordinate = Value | Family | LayerKernel
Axes = Mapping[str, tuple[Coordinate, ...]]


def _axes() -> dict[str, tuple[Coordinate, ...]]:
    found: dict[str, dict[Coordinate, None]] = {}
    for family in reversed(FAMILIES):
        for name, values in family.AXES.items():
            found.setdefault(name, {}).update(dict.fromkeys(values))
    numbers = {name: all(isinstance(value, int) for value in values) for name, values in found.items()}
    axes = {name: tuple(sorted(values) if numbers[name] else values) for name, values in found.items()}
    return {**axes, "family": tuple(Family)}


AXES: dict[str, tuple[Coordinate, ...]] = _axes()
"""The knobs of all families, each with all values that any of them searches, and the family itself. Where a
family lacks a knob, its place on that axis is a constant."""


def axes_of(schedule: AnySchedule) -> Axes:
    """Return the axes of what a schedule runs: a recurrence's, or those of one kernel around it."""
    return {**schedule.AXES, "family": (schedule.family,)} if isinstance(schedule, Tiles) else AXES


def values_of(schedule: AnySchedule) -> dict[str, Coordinate]:
    """Return a schedule as a value for each axis."""
    return {name: attrgetter(name)(schedule) for name in axes_of(schedule)}


def place(values: Sequence[Coordinate], value: Coordinate) -> int:
    """Return where a value is among those of an axis; one between two of them is at the lower, one below all first."""
    if value in values:
        return values.index(value)
    lower = sum(isinstance(other, int) and isinstance(value, int) and other < value for other in values)
    return max(0, lower - 1)


def indices(schedule: AnySchedule) -> dict[str, int]:
    """Return a schedule as places on the axes."""
    axes = axes_of(schedule)
    return {name: place(axes[name], value) for name, value in values_of(schedule).items()}


def columns(points: Sequence[AnySchedule]) -> Iterable[list[int]]:
    """Yield the places of points on each of their axes: there may be many points."""
    for name, values in axes_of(points[0]).items():
        known = {value: index for index, value in enumerate(values)}
        value_of = attrgetter(name)
        yield [known[v] if (v := value_of(point)) in known else place(values, v) for point in points]


def distributions(axes: Axes = AXES) -> dict[str, BaseDistribution]:
    """Return what Optuna is told of axes: that their places are numbers in order."""
    from optuna.distributions import IntDistribution

    return {name: IntDistribution(0, len(values) - 1) for name, values in axes.items()}


def labels(schedule: AnySchedule) -> dict[str, int | str]:
    """Return a schedule as people read it: the value on each axis that is its own or next to it."""
    axes = axes_of(schedule)
    return {name: _label(axes[name][index]) for name, index in indices(schedule).items()}


def choices(axes: Axes = AXES) -> dict[str, BaseDistribution]:
    """Return what Optuna is told of ``labels``."""
    from optuna.distributions import CategoricalDistribution

    return {name: CategoricalDistribution([_label(value) for value in values]) for name, values in axes.items()}


def _label(value: Coordinate) -> int | str:
    return value if isinstance(value, int) else str(value)


def moved(schedule: AnySchedule, knobs: Mapping[str, Any]) -> AnySchedule:
    """Return the schedule of the same family with other values of some of its knobs."""
    return type(schedule).of({**values_of(schedule), **knobs})
