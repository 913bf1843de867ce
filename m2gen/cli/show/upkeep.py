"""Print changes of the tuning database, and the results of checking or measuring records again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from m2gen.cli.show.names import counted, known_names
from m2gen.cli.show.report import print_json
from m2gen.cli.show.table import Table, print_tables
from m2gen.db import Change, Fault
from m2gen.errors import listed
from m2gen.pipeline import Recheck, Replayed, Superfluous


def show_change(change: Change, *, as_json: bool) -> None:
    """Print the numbers of added, replaced and refused records."""
    ids = {name: [record.id for record in getattr(change, name)] for name in ("added", "removed", "refused")}
    if as_json:
        print_json(ids)
        return
    added, removed, refused = map(len, ids.values())
    why = "already there, or another is preferred"
    print(f"{counted(added, 'record')} added, {removed} replaced, {refused} not added: {why}")


def show_pruned(found: Sequence[Superfluous], faults: Sequence[Fault], *, dry_run: bool, as_json: bool) -> None:
    """Print the records and lines that were, or would be, removed, and why."""
    if as_json:
        records = [{"record": item.record.id, "why": item.reason} for item in found]
        print_json({"removed": not dry_run, "records": records, "lines": [str(fault) for fault in faults]})
        return
    if found:
        names = known_names(item.record.key.variant for item in found)
        rows = [(i.record.id, names[i.record.key.variant], i.record.environment.device, i.reason) for i in found]
        print_tables([Table("Superfluous", ("id", "layer", "device", "why"), rows)])
    for line in listed(map(str, faults)):
        print(line)
    print(f"{counted(len(found), 'record')} and {counted(len(faults), 'line')} {'would be ' if dry_run else ''}removed")


def show_rechecks(found: Sequence[Recheck], *, as_json: bool) -> int:
    """Print the result of the check for every record; return 1 if one failed."""
    if as_json:
        print_json([_recheck_json(item) for item in found])
    elif found:
        names = known_names(item.record.key.variant for item in found)
        rows = [
            (item.record.id, names[item.record.key.variant], item.record.schedule.describe(), _verdict(item))
            for item in found
        ]
        print_tables([Table("Verified", ("id", "layer", "schedule", "result"), rows)])
    else:
        print("no winners to verify")
    return 1 if any(item.failed for item in found) else 0


def _recheck_json(item: Recheck) -> dict[str, str]:
    record = item.record
    return {
        "id": record.id,
        "variant": record.key.variant,
        "schedule": record.schedule.slug,
        "result": _verdict(item),
    }


def _verdict(item: Recheck) -> str:
    if item.found is None:
        return f"skipped: {item.skipped}"
    failure = item.found.failure
    return f"FAILED: {failure.reason}: {failure.message}" if failure else "ok"


def show_replay(found: Replayed, *, as_json: bool) -> None:
    """Print a record's times beside the new ones."""
    timing = found.record.timing
    assert timing is not None
    measured = {"tuned": (timing.tuned, found.tuned), "default": (timing.default, found.default)}
    if as_json:
        pairs = {name: {"recorded": asdict(then), "now": asdict(now)} for name, (then, now) in measured.items()}
        print_json({"id": found.record.id, **pairs, "faster_than_default": found.faster})
        return
    rows = [
        (name, f"{e.median_ms:.3f}", f"{e.low_ms:.3f} to {e.high_ms:.3f}")
        for what, both in measured.items()
        for name, e in zip((f"{what}, recorded", f"{what}, now"), both, strict=True)
    ]
    title = f"Record {found.record.id}: {found.record.schedule.describe()}"
    print_tables([Table(title, ("what", "ms", "95 % interval"), rows)])
    print(
        "the record's schedule is still the best" if found.faster else "the default schedule is as fast, within noise"
    )
