"""What a schedule is, in the words that tables and messages use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from m2gen.schedule.knobs import Layouts, Schedule

_FAMILIES = {Layouts.AUTO: "portable", Layouts.EXPLICIT: "mma", Layouts.WARPGROUP: "wgmma"}


def schedule_words(schedule: Schedule) -> str:
    """Say family, rows of the state a program, warps and segments: ``mma, 64/32 rows, 2/1 warps, 7 segments``.

    Two numbers are of the forward and of the backward. Schedules that differ in other knobs have the same words.
    """
    forward, backward = schedule.forward, schedule.backward
    words = [_FAMILIES[schedule.layouts], f"{_both(forward.rows, backward.rows)} rows"]
    warps = _both(forward.warps, backward.warps)
    words += [f"{warps} warp" if warps == "1" else f"{warps} warps"]
    words += [f"{schedule.segments} segments"] if schedule.segments > 1 else []
    return ", ".join(words)


def full_words(schedule: Schedule, base: Schedule | None) -> str:
    """Say what a schedule is and, after a semicolon, the knobs beyond that in which it differs from ``base``."""
    words = schedule_words(schedule)
    if base is None:
        return words
    usual = dict(_knobs(asdict(base)))
    said = ("rows", "warps", "segments", "layouts")
    knobs = [(name, value) for name, value in _knobs(asdict(schedule)) if name.rpartition(".")[2] not in said]
    differing = [f"{name} {value}" for name, value in knobs if usual.get(name) != value]
    return f"{words}; {', '.join(differing)}" if differing else words


def _knobs(values: dict[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _knobs(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value


def _both(forward: int, backward: int) -> str:
    return str(forward) if forward == backward else f"{forward}/{backward}"
