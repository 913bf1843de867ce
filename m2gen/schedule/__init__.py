"""Schedules: how a kernel may run. Each family of kernels has its knobs, default, axes and check.

``Schedule`` is the union of them; ``AnySchedule`` has the tiles of the kernels around a layer's recurrence, too.
``problems`` is the one predicate of what is valid; ``default`` is what serves until a search has found better.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from m2gen.bucket import Bucket
from m2gen.device import Device
from m2gen.errors import ScheduleError
from m2gen.schedule.knobs import Axes, Family, Knobs, Reduction, Scratch, Tanh, Value
from m2gen.schedule.layer import (
    ConvolveBackwardTiles,
    ConvolveTiles,
    DecayTiles,
    DecodeTiles,
    FinishBackwardTiles,
    FinishTiles,
)
from m2gen.schedule.learned import learned_schedule
from m2gen.schedule.mma import Mma
from m2gen.schedule.mma_tiles import MmaBackward, MmaForward
from m2gen.schedule.portable import Portable, PortableBackward, PortableForward
from m2gen.schedule.slugs import parse, parse_tiles
from m2gen.schedule.tiles import ForwardTile
from m2gen.schedule.wgmma import Warpgroup, WarpgroupBackward, WarpgroupForward, Wgmma
from m2gen.variant import Variant

__all__ = [
    "FAMILIES",
    "AnySchedule",
    "Axes",
    "Family",
    "ForwardTile",
    "Knobs",
    "Mma",
    "MmaBackward",
    "MmaForward",
    "Part",
    "Portable",
    "PortableBackward",
    "PortableForward",
    "Reduction",
    "Schedule",
    "Scratch",
    "Tanh",
    "Value",
    "Warpgroup",
    "WarpgroupBackward",
    "WarpgroupForward",
    "Wgmma",
    "check",
    "default",
    "defaults",
    "parse",
    "parse_any",
    "problems",
]

Schedule = Annotated[Wgmma | Mma | Portable, Field(discriminator="family")]
AnySchedule = Annotated[
    Wgmma
    | Mma
    | Portable
    | ConvolveTiles
    | ConvolveBackwardTiles
    | DecayTiles
    | FinishTiles
    | FinishBackwardTiles
    | DecodeTiles,
    Field(discriminator="family"),
]
"""The schedule of a recurrence, or the tiles of one of the kernels around it: what searches try and records hold."""
Part = ForwardTile | PortableBackward | MmaBackward | Warpgroup
"""How one of a schedule's two kernels runs."""

FAMILIES: tuple[type[Wgmma] | type[Mma] | type[Portable], ...] = (Wgmma, Mma, Portable)
"""The families, those first whose defaults are preferred where they can serve."""


def parse_any(slug: str) -> AnySchedule:
    """Return the schedule or the tiles that a slug names; raises ``ScheduleError`` for any other text."""
    return parse(slug) if slug.startswith(tuple(Family)) else parse_tiles(slug)


def defaults(variant: Variant, device: Device, bucket: Bucket | None = None) -> tuple[Schedule, ...]:
    """Return what serves ``variant`` on ``device`` without a search, the preferred schedule first.

    That is the learned rule's for calls of a ``bucket``, where there is one, then the default of every family.
    """
    found = learned_schedule(variant, device, bucket) if bucket is not None else None
    by_family = _of_families(variant, device)
    return by_family if found is None else (found, *(each for each in by_family if each != found))


def _of_families(variant: Variant, device: Device) -> tuple[Schedule, ...]:
    serving = [family for family in FAMILIES if not family.unsupported(variant, device)]
    first = next(family for family in serving if family.preferred(variant, device))
    serving.sort(key=lambda family: family is not first)
    return tuple(family.default(variant, device) for family in serving)


def default(variant: Variant, device: Device, bucket: Bucket | None = None) -> Schedule:
    """Return the schedule that serves calls of a ``bucket``, or of any size, until a tuned one does."""
    return defaults(variant, device, bucket)[0]


def problems(variant: Variant, schedule: Schedule, device: Device) -> tuple[str, ...]:
    """Return why ``schedule`` cannot serve ``variant`` on ``device``; empty when it can."""
    return tuple(schedule.problems(variant, device))


def check(variant: Variant, schedule: Schedule, device: Device) -> Schedule:
    """Return ``schedule``, or raise ``ScheduleError`` with every reason why it is not valid."""
    reasons = problems(variant, schedule, device)
    if reasons:
        raise ScheduleError(f"{variant.key} on {device.arch}: {'; '.join(reasons)}")
    return schedule
