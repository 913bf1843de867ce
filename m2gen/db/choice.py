"""Choose the schedules that serve a variant on an arch: from records of the tuning database, or the default."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from m2gen.bucket import BUCKETS, Bucket
from m2gen.db.lookup import Query, Tier, look_up, usual_device
from m2gen.db.record import Record
from m2gen.device import PORTABLE, Device
from m2gen.schedule import Schedule, default
from m2gen.schedule.layer import USUAL, AnyTiles, LayerTiles
from m2gen.schedule.layer_knobs import Tiles
from m2gen.schedule.tunable import Tunable, kernels_of
from m2gen.spec import Objective
from m2gen.variant import BuiltVariant, Variant

LONGEST_NAME = 59
"""Characters of a generated file's name."""


def module_name(variant: Variant, schedule: Schedule) -> str:
    """Name a module of kernels by dims, heads, dtype and family, and by 12 hex digits of its variant and schedule.

    The module's title says both in full. However long the dims are, the file's name has at most ``LONGEST_NAME``
    characters: what is cut off stands in the title, and the digits tell modules apart.
    """
    digits = hashlib.sha256(f"{variant.key} {schedule.slug}".encode()).hexdigest()[:12]
    dims = f"k{variant.state_expansion}_v{variant.head_dim}_n{variant.total_heads}"
    said = f"{dims}_{variant.dtype}_{schedule.family}"
    return f"{said[: LONGEST_NAME - len('_.py') - len(digits)]}_{digits}"


@dataclass(frozen=True)
class Choice:
    """The schedule that serves some buckets of one variant on one arch, and where it came from."""

    built: BuiltVariant
    device: Device
    schedule: Schedule
    tier: Tier = Tier.DEFAULT
    """How close the record is to the calls that it serves."""
    record: Record | None = None
    buckets: tuple[Bucket, ...] = BUCKETS
    tiles: LayerTiles = USUAL
    """Tiles of the kernels around the recurrence, the same for all buckets."""
    tile_records: tuple[Record, ...] = ()
    """Where those come from that are no defaults, or that a record says are the best."""

    @property
    def variant(self) -> Variant:
        return self.built.variant

    @property
    def module(self) -> str:
        """Name of the module that holds the kernels."""
        return module_name(self.variant, self.schedule)

    @property
    def source(self) -> str:
        """The tier, and the record's id where one serves."""
        return str(self.tier) if self.record is None else f"{self.tier} {self.record.id}"

    @property
    def calls(self) -> str:
        """The buckets that are served, for tables."""
        return "all" if self.buckets == BUCKETS else " ".join(self.buckets)


def choose(built: BuiltVariant, device: Device, objective: Objective, records: Iterable[Record]) -> tuple[Choice, ...]:
    """Return the choices that serve all buckets of a variant on an arch, each schedule and tier once, in bucket order.

    ``device`` names an arch; records of the product that packages for it are built for (``db.usual_device``) come
    first. The GPU at hand plays no part, so that a database gives the same package on every machine.
    """
    if device == PORTABLE:
        return (Choice(built, device, default(built.variant, device)),)
    records = tuple(records)
    product = usual_device(records, device.arch, objective)
    tuned = _tile_records(built.variant, Query("", objective, device.arch, product, BUCKETS[-1]), records)
    tiles = LayerTiles.of(_tiles_of(record) for record in tuned)
    same = [record for record in records if record.key.variant == built.variant.key]
    buckets: dict[tuple[Schedule, Tier, Record | None], list[Bucket]] = {}
    for bucket in BUCKETS:
        served = look_up(same, Query(built.variant.key, objective, device.arch, product, bucket))
        record = served.record
        schedule = default(built.variant, device, bucket) if record is None else _schedule_of(record)
        buckets.setdefault((schedule, served.tier, record), []).append(bucket)
    return tuple(
        Choice(built, device, schedule, tier, record, tuple(having), tiles, tuned)
        for (schedule, tier, record), having in buckets.items()
    )


def _tile_records(variant: Variant, query: Query, records: tuple[Record, ...]) -> tuple[Record, ...]:
    """Return the records that serve the kernels around a recurrence, for a query but for its key."""
    keys = [Tunable.around(variant, kernel).key for kernel in kernels_of(query.objective, variant)]
    found = [look_up(records, replace(query, variant=key)).record for key in keys]
    return tuple(record for record in found if record is not None)


def _schedule_of(record: Record) -> Schedule:
    assert not isinstance(record.schedule, Tiles)
    return record.schedule


def _tiles_of(record: Record) -> AnyTiles:
    assert isinstance(record.schedule, Tiles)
    return record.schedule


def modules_by_bucket(choices: Iterable[Choice]) -> tuple[str, ...]:
    """Return the modules that serve one variant on one arch: one for each bucket, or one for all."""
    by_bucket = {bucket: choice.module for choice in choices for bucket in choice.buckets}
    modules = tuple(by_bucket[bucket] for bucket in BUCKETS)
    return modules if len(set(modules)) > 1 else modules[:1]
