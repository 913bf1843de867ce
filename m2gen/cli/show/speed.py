"""Draw a run: the time or memory of calls with m2gen's kernels beside other implementations."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from m2gen.bench.document import Document, Row
from m2gen.bench.kinds import Call, Kind
from m2gen.cli.show.bars import FORWARD, MEMORY, STEP, Group, Panel, bars_figure, names_of
from m2gen.cli.show.bench import WorkloadKey, workload_names, workload_of
from m2gen.cli.show.figure import Plot, Quantity, write_figure
from m2gen.cli.show.names import MARK, implementation_names
from m2gen.errors import UsageError

OURS = "m2gen, tuned"
PANELS: dict[Quantity, tuple[Panel, ...]] = {Quantity.TIME: (FORWARD, STEP), Quantity.MEMORY: (MEMORY,)}
NEEDED = (
    "--plot must have times of m2gen's kernels beside those of another implementation: of --peer, or of the default "
    "schedule beside a tuned one"
)


def speed_groups(document: Document, quantity: Quantity = Quantity.TIME) -> list[Group]:
    """Return a group for every workload with times of m2gen and another implementation.

    m2gen's kernels are the tuned ones, or the default ones if tuning has no others; they are compared with peers, or
    without peers with the default. Raises UsageError if there is no such workload, and names on standard error those
    that are left out.
    """
    every: dict[WorkloadKey, dict[str, Row]] = {}
    for row in document.rows:
        if row.call is Call.SEQUENCE:
            every.setdefault(workload_of(row), {})[row.implementation] = row
    failed = {where for where, rows in every.items() if (ours := rows.get(Kind.TUNED)) is not None and not _timed(ours)}
    timed = {where: {name: row for name, row in rows.items() if _timed(row)} for where, rows in every.items()}
    for where in failed:  # the default's times are not those of what tuning found
        timed[where].pop(str(Kind.DEFAULT), None)
    found = [row for rows in timed.values() for row in rows.values() if row.implementation not in set(Kind)]
    marked = {row.implementation for row in found if row.unverified}
    short = implementation_names(dict.fromkeys(row.implementation for row in found))
    labels = {name: f"{words} kernel" + (MARK if name in marked else "") for name, words in short.items()}
    labels = labels or {str(Kind.DEFAULT): "m2gen, default schedule"}
    names = workload_names(timed)
    groups = {where: _group(names[where], rows, labels, quantity) for where, rows in timed.items()}
    drawn = [group for group in groups.values() if group is not None]
    if not drawn:
        raise UsageError(f"{NEEDED}, got none")
    left_out = [names[where] for where, group in groups.items() if group is None]
    if left_out:
        print(f"m2gen: not drawn, since there is no time to compare: {'; '.join(left_out)}", file=sys.stderr)
    return drawn


def _timed(row: Row) -> bool:
    return not row.failure and row.step is not None and row.forward is not None


def _group(name: str, rows: dict[str, Row], labels: dict[str, str], quantity: Quantity) -> Group | None:
    ours = rows.get(Kind.TUNED) or (rows.get(Kind.DEFAULT) if str(Kind.DEFAULT) not in labels else None)
    others = {label: rows[implementation] for implementation, label in labels.items() if implementation in rows}
    if ours is None or not others:
        return None
    values = {label: _values(row, quantity) for label, row in {OURS: ours, **others}.items()}
    layer, _, _ = name.rpartition(", ")
    return Group(layer, _size(ours), values)


def _size(row: Row) -> str:
    return f"{row.batch} × 1 to {row.seq} tokens" if row.packed else f"{row.batch} × {row.seq} tokens"


def _values(row: Row, quantity: Quantity) -> tuple[float | None, ...]:
    if quantity is Quantity.MEMORY:
        return (row.extra_bytes / 1e9,)
    assert row.forward is not None
    assert row.step is not None
    return (row.forward.median_ms, row.step.median_ms)


def check_comparable(kinds: Sequence[Kind], peers: Iterable[str]) -> None:
    """Raise UsageError if the implementations to time include nothing to compare."""
    asked = set(kinds)
    if not ((Kind.PEER in asked and any(True for _ in peers)) or {Kind.DEFAULT, Kind.TUNED} <= asked):
        raise UsageError(f"{NEEDED}, got {', '.join(kinds)}")


def speed_title(document: Document, groups: Sequence[Group], quantity: Quantity = Quantity.TIME) -> str:
    """Return the title of the picture."""
    _, *others = names_of(groups)
    beside = f"the {others[0].removesuffix(MARK)}" if len(others) == 1 else "other implementations"
    what = "Memory" if quantity is Quantity.MEMORY else "Time"
    return f"{what} of one call on an {document.environment.device}: m2gen's kernels beside {beside}"


def draw_speed(document: Document, plot: Plot) -> None:
    """Draw a run's workloads into a file: bars of milliseconds or gigabytes, m2gen's beside the others'."""
    groups = speed_groups(document, plot.quantity)
    title = speed_title(document, groups, plot.quantity)
    write_figure(plot, title, lambda theme: bars_figure(groups, PANELS[plot.quantity], title, theme))
