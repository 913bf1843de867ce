"""A plan: a spec with the schedules that serve it, and the package that it renders to."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from m2gen.bucket import BUCKETS
from m2gen.db import Database, Record
from m2gen.db.choice import Choice, choose
from m2gen.device import PORTABLE, Device, target
from m2gen.errors import SpecError, UsageError, among
from m2gen.package import emit
from m2gen.package.emit import Origin, Package
from m2gen.schedule import Portable, Schedule
from m2gen.schedule.tunable import keys_of
from m2gen.shipped import shipped
from m2gen.spec import Layer, Spec, find_spec, load_spec, spec_hash
from m2gen.spec.problems import printable
from m2gen.variant import BuiltVariant, Variant, expand, layer_names


class Progress(Protocol):
    """Shows how far a stage is."""

    def start(self, stage: str, total: int) -> None: ...
    def advance(self, item: str) -> None: ...
    def finish(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """A spec with the schedule that serves each of its variants on each arch."""

    spec: Spec
    origin: Origin
    choices: tuple[Choice, ...]

    @property
    def variants(self) -> tuple[BuiltVariant, ...]:
        return tuple(dict.fromkeys(choice.built for choice in self.choices))

    def layers(self, names: Collection[str] = ()) -> dict[str, Layer]:
        """Return the spec's layers with these names, or all if none is given; raises UsageError for an unknown one."""
        for name in names:
            if name not in self.spec.layers:
                raise UsageError(f"--layer must be {among(self.spec.layers)}, got {name!r}")
        return {name: layer for name, layer in self.spec.layers.items() if not names or name in names}

    @property
    def names(self) -> dict[Variant, str]:
        """Names of the variants in tables and messages: layers and dtype."""
        return layer_names(self.variants)

    def serving(self, variant: Variant, arch: str) -> tuple[Choice, ...]:
        """Return the choices that serve ``variant`` on ``arch``: its own schedules, or the portable one."""
        having = [choice for choice in self.choices if choice.variant == variant]
        return tuple(c for c in having if c.device.arch == arch) or tuple(c for c in having if c.device == PORTABLE)

    def interval(self, variant: Variant, arch: str) -> int:
        """Return the checkpoint interval for ``variant`` on ``arch`` in the smallest bucket."""
        return self.serving(variant, arch)[0].schedule.interval

    def without_records(self) -> Plan:
        """Return the plan without records: default schedules everywhere."""
        pairs = dict.fromkeys((choice.built, choice.device) for choice in self.choices)
        chosen = (c for built, device in pairs for c in choose(built, device, self.spec.tuning.objective, ()))
        return replace(self, choices=tuple(chosen))

    def portable(self) -> Plan:
        """Return the plan of the portable family's default schedules."""
        pairs = dict.fromkeys((choice.built, choice.device) for choice in self.choices)
        chosen = (Choice(built, device, Portable.default(built.variant, device)) for built, device in pairs)
        return replace(self, choices=tuple(chosen))

    def uniform(self) -> tuple[Plan, ...]:
        """Return plans in which a variant has one schedule for all calls, and which together have every schedule.

        Small problems reach every kernel in them. If no variant has several schedules, the only plan is this one.
        """
        schedules: dict[tuple[BuiltVariant, Device], dict[Schedule, Choice]] = {}
        for choice in self.choices:
            schedules.setdefault((choice.built, choice.device), {}).setdefault(choice.schedule, choice)
        lists = [list(found.values()) for found in schedules.values()]
        return tuple(
            replace(self, choices=tuple(replace(c[min(i, len(c) - 1)], buckets=BUCKETS) for c in lists))
            for i in range(max(map(len, lists)))
        )


def shipped_specs() -> Path:
    """Return the folder of specs that ship with m2gen."""
    return shipped("specs")


def open_spec(name: str) -> tuple[Spec, Path]:
    """Find and load a spec by file name or path."""
    path = find_spec(name, roots=[shipped_specs()])
    return load_spec(path), path


def shipped_database() -> Database:
    """Return the database that ships with m2gen."""
    return Database(shipped("tuning_db"))


def relevant(records: Iterable[Record], variants: Iterable[BuiltVariant]) -> tuple[Record, ...]:
    """Return the records of ``variants`` and of the kernels around their recurrences."""
    keys = {key for built in variants for key in keys_of(built.variant)}
    return tuple(record for record in records if record.key.variant in keys)


def plan(name: str, arches: Iterable[str] | None = None, records: Iterable[Record] | None = None) -> Plan:
    """Choose schedules for every variant of a spec on each of ``arches`` (the spec's targets if None) and ``portable``.

    ``records`` come from a tuning database, the shipped one if None. Raises SpecError, and UsageError for an unknown
    arch.
    """
    spec, path = open_spec(name)
    if not path.name.isprintable() or {'"', "\\"} & {*path.name}:
        contract = "a file whose name, which generated code states, is printable without double quotes and backslashes"
        raise SpecError([f"{printable(name)}: $ must be {contract}, got {path.name!a}"])
    devices = [target(arch) for arch in dict.fromkeys(spec.targets if arches is None else arches)]
    variants = expand(spec)
    known = relevant(shipped_database().records() if records is None else records, variants)
    choices = tuple(
        choice
        for device in (*devices, PORTABLE)
        for built in variants
        for choice in choose(built, device, spec.tuning.objective, known)
    )
    return Plan(spec, Origin(spec.name, path.name, spec_hash(spec)), choices)


def render(planned: Plan) -> Package:
    """Render the package of a plan, which is a pure function of it."""
    return emit.package(planned.origin, planned.choices)
