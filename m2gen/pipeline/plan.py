"""A spec with the schedules that serve it, and the package they render."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from m2gen import emit
from m2gen.device import PORTABLE, target
from m2gen.emit import Choice, Origin, Package
from m2gen.schedule import default
from m2gen.spec import Spec, find_spec, load_spec, spec_hash
from m2gen.variant import BuiltVariant, Variant, expand


class Progress(Protocol):
    """Whoever shows how far a stage is."""

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

    def interval(self, variant: Variant, arch: str) -> int:
        """Return the checkpoint interval that serves ``variant`` on ``arch``."""
        serving = {c.device.arch: c.schedule for c in self.choices if c.variant == variant}
        return serving.get(arch, serving[PORTABLE.arch]).interval


def shipped_specs() -> Path:
    """Return the folder of specs that ship with m2gen: beside the package, or inside an installed wheel."""
    here = Path(__file__).resolve().parent.parent
    return here / "specs" if (here / "specs").is_dir() else here.parent / "specs"


def open_spec(name: str) -> tuple[Spec, Path]:
    """Find and load a spec by file name or path."""
    path = find_spec(name, roots=[shipped_specs()])
    return load_spec(path), path


def plan(name: str, arches: Iterable[str] | None = None) -> Plan:
    """Choose a schedule for every variant of a spec on each of ``arches`` (the spec's targets) and ``portable``."""
    spec, path = open_spec(name)
    devices = [target(arch) for arch in dict.fromkeys(spec.targets if arches is None else arches)]
    choices = tuple(
        Choice(built, device, default(built.variant, device), "default")
        for device in (*devices, PORTABLE)
        for built in expand(spec)
    )
    return Plan(spec, Origin(spec.name, path.name, spec_hash(spec)), choices)


def render(planned: Plan) -> Package:
    """Render the package of a plan; pure."""
    return emit.package(planned.origin, planned.choices)
