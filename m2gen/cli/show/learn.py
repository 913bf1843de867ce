"""Print how a learned rule does."""

from __future__ import annotations

import math
from collections.abc import Sequence

from m2gen.bench.entries import sized
from m2gen.bench.kinds import Call
from m2gen.cli.show.names import known_names
from m2gen.cli.show.report import print_json
from m2gen.cli.show.table import Table, print_tables
from m2gen.tune.learn import RuleScore

COLUMNS = ("workload", "best ms", "family's default", "rule", "rule without it", "its choice")
CLOSE = 1.1


def show_learned(found: Sequence[RuleScore], *, as_json: bool) -> None:
    """Print each workload's times as multiples of its best."""
    if as_json:
        print_json([_values(each) for each in found])
        return
    names = known_names(each.lesson.at.variant.key for each in found)
    several = len({each.lesson.at.device for each in found}) > 1
    rows = [_cells(each, names[each.lesson.at.variant.key], several=several) for each in found]
    timed = [each.without for each in found if each.without is not None]
    close = sum(times <= CLOSE for times in timed)
    mean = math.exp(sum(map(math.log, timed)) / len(timed)) if timed else None
    untimed = f"; {len(found) - len(timed)} choose what was not timed there" if len(timed) < len(found) else ""
    notes = [
        "multiples of the best time of any trial, or of a forward and a backward of two",
        f"without it: {close} of {len(found)} are within 10 % of their best{untimed}"
        + ("" if mean is None else f"; the mean{' of the others' if untimed else ''} is {mean:.3f}"),
    ]
    print_tables([Table("Learned from trials", COLUMNS, rows, notes)])


def _values(each: RuleScore) -> dict[str, object]:
    at = each.lesson.at
    return {
        "variant": at.variant.key,
        "arch": at.device.arch,
        "device": at.device.name,
        "batch": at.batch,
        "seq": at.seq,
        "best_ms": each.lesson.best_ms,
        "families": each.families,
        "rule": each.rule,
        "without": each.without,
        "choice": each.choice.slug,
    }


def _cells(each: RuleScore, name: str, *, several: bool) -> tuple[str, ...]:
    """Return a workload's row, which names its GPU where there are ``several``."""
    at = each.lesson.at
    where = f", {at.device.name}" if several else ""
    times = ("not timed" if ms is None else f"{ms:.3f}" for ms in (each.families, each.rule, each.without))
    return (
        f"{name}, {sized(Call.SEQUENCE, at.batch, at.seq)}{where}",
        f"{each.lesson.best_ms:.3f}",
        *times,
        each.choice.slug,
    )
