"""Recipes: schedules without the dims of a variant, so that what is fast for one serves another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from m2gen.device import Device
from m2gen.schedule.knobs import Family, Knobs, Reduction, Scratch, Value, best_tanh
from m2gen.schedule.mma import Mma
from m2gen.schedule.portable import Portable
from m2gen.schedule.slots import across
from m2gen.schedule.wgmma import Wgmma
from m2gen.variant import Variant

TYPES: dict[Family, type[Mma] | type[Portable] | type[Wgmma]] = {kind.family: kind for kind in (Mma, Portable, Wgmma)}
ALL_ROWS = 256
"""Rows of a recipe whose programs have a whole state, however many rows that has."""
MOST_WARPS = 8
BEST = ("tanh", "backward.xorsign")
"""Knobs that a recipe leaves to the variant and the GPU."""
WORDS = {"forward.reduction": Reduction, "backward.reduction": Reduction, "backward.scratch": Scratch}


@dataclass(frozen=True)
class Recipe:
    """A family and its knobs; a state of fewer rows makes programs smaller, one of other columns changes their warps.

    ``tile`` stands for warps: the elements of the state that each has. tanh is the fastest that the spec allows, and
    what is carried is clamped by as few instructions as the GPU has.
    """

    family: Family
    knobs: tuple[tuple[str, Value], ...]

    @classmethod
    def of(cls, schedule: Knobs, variant: Variant) -> Recipe:
        """Return the recipe of a schedule that serves ``variant``."""
        knobs = {name: attrgetter(name)(schedule) for name in schedule.AXES if name not in BEST}
        knobs = {name: value for name, value in knobs.items() if schedule.IMPLIED.get(name) != value}
        for side in ("forward", "backward"):
            if f"{side}.warps" in knobs:
                knobs[f"{side}.tile"] = knobs[f"{side}.rows"] * variant.padded_cols // knobs.pop(f"{side}.warps")
        if not across(variant):  # warps have rows of their own where steps have slots
            knobs |= {"backward.rows": ALL_ROWS} if schedule.warps_have_slots else {}
            knobs |= {"forward.rows": ALL_ROWS} if schedule.forward.slots else {}
        return cls(schedule.family, tuple(sorted(knobs.items())))

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Recipe:
        """Return the recipe of JSON values that ``written`` made."""
        knobs: dict[str, Value] = {name: _read(name, value) for name, value in given.items() if name != "family"}
        return cls(Family(given["family"]), tuple(sorted(knobs.items())))

    @property
    def written(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        return {"family": str(self.family), **{name: v if isinstance(v, int) else str(v) for name, v in self.knobs}}

    def at(self, variant: Variant, device: Device) -> Mma | Portable | Wgmma:
        """Return the schedule for a variant on a device, which may not be valid there."""
        values: dict[str, Any] = {**dict(self.knobs), "tanh": best_tanh(variant, device)}
        for side in ("forward", "backward"):
            if f"{side}.tile" in values:
                rows = values[f"{side}.rows"] = min(values[f"{side}.rows"], variant.padded_rows)
                warps = rows * variant.padded_cols // values.pop(f"{side}.tile")
                values[f"{side}.warps"] = max(1, min(MOST_WARPS, warps))
        return TYPES[self.family].of(values).on(device)


def _read(name: str, value: Any) -> Value:
    kind: Any = WORDS.get(name, int)
    found: Value = kind(value)
    return found
