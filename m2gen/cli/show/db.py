"""What ``m2gen db`` prints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from m2gen.cli.show.report import print_json, print_table
from m2gen.db import Change, Database, Fault, Record, encode, slot
from m2gen.pipeline import Answer, Recheck, Replayed, Superfluous, state

LIST_COLUMNS = ("id", "device", "variant", "for", "programs/SM", "schedule", "ms", "default ms", "speed-up", "state")
WHY_COLUMNS = ("id", "device", "programs/SM", "schedule", "of default", "why not")


def _document(record: Record) -> dict[str, Any]:
    return {**json.loads(encode(record)), "status": record.status, "state": state(record)}


def _times(record: Record) -> tuple[str, str, str]:
    if record.timing is None:
        return ("", "", "")
    tuned, usual = record.timing.tuned.median_ms, record.timing.default.median_ms
    return (f"{tuned:.3f}", f"{usual:.3f}", f"{usual / tuned:.2f}x")


def _list_cells(record: Record) -> tuple[Any, ...]:
    key, where = record.key, record.environment
    what = (record.id, where.device, key.variant, key.objective, key.bucket, record.schedule.slug)
    return (*what, *_times(record), state(record))


def show_list(database: Database, records: Sequence[Record], *, everything: bool, as_json: bool) -> None:
    """Print winners, and with ``everything`` failures, too."""
    shown = [record for record in records if everything or record.failure is None]
    if as_json:
        print_json([_document(record) for record in shown])
        return
    failures = sum(record.failure is not None for record in records)
    if shown:
        print_table(f"Records of {database.root}", LIST_COLUMNS, map(_list_cells, shown))
    more = "" if everything or not failures else ", which --all lists"
    print(f"{database.root}: {len(records) - failures} winners, {failures} failures{more}")


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the single values of a document with their places."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{place}.{name}" if place else name)
    elif isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield from _flat(item, f"{place}[{number}]")
    else:
        yield place, "" if value in (None, []) else value


def show_record(record: Record, *, as_json: bool) -> None:
    """Print everything that a record says."""
    if as_json:
        print_json(_document(record))
    else:
        print_table(f"Record {record.id}", ("what", "value"), _flat(_document(record)))


def show_why(answers: Iterable[Answer], batch: int | None, seq: int | None, *, as_json: bool) -> None:
    """Print what serves each query, and why others do not."""
    if as_json:
        print_json([_answer_document(answer) for answer in answers])
        return
    if seq is not None:
        print(f"The length of sequences ({seq}) plays no part in choosing a schedule.")
    for answer in answers:
        query, served = answer.query, answer.served
        calls = f"batch {batch}, " if batch is not None else ""
        title = f"{query.variant}, {query.objective}, {calls}{query.bucket} programs/SM on {query.device}"
        rows = [_why_cells(served.record, f"serves: {served.tier}")] if served.record else []
        rows += [_why_cells(rejection.record, rejection.reason) for rejection in served.rejected]
        outcome = f"{served.tier} {served.record.id}" if served.record else "default schedule: no record can serve"
        print(f"{title} ({query.arch}, {answer.sm_count} SMs): {outcome}")
        if rows:
            print_table("Records of the variant", WHY_COLUMNS, rows)


def _why_cells(record: Record, reason: str) -> tuple[Any, ...]:
    ratio = f"at most {record.timing.ratio:.3f}" if record.timing else ""
    return (record.id, record.environment.device, record.key.bucket, record.schedule.slug, ratio, reason)


def _answer_document(answer: Answer) -> dict[str, Any]:
    query, served = answer.query, answer.served
    return {
        "variant": query.variant,
        "objective": query.objective,
        "arch": query.arch,
        "device": query.device,
        "sm_count": answer.sm_count,
        "bucket": query.bucket,
        "tier": served.tier,
        "record": served.record and served.record.id,
        "flag": state(served.record) if served.record else "",
        "rejected": [{"record": rejection.record.id, "why": rejection.reason} for rejection in served.rejected],
    }


def show_record_difference(one: Record, other: Record, *, as_json: bool) -> int:
    """Print the fields in which two records differ; return 1 if there are any."""
    left, right = (dict(_flat(_document(record))) for record in (one, other))
    places = [place for place in {**left, **right} if left.get(place) != right.get(place)]
    rows = [(place, left.get(place), right.get(place)) for place in places]
    if as_json:
        print_json([dict(zip(("field", "a", "b"), row, strict=True)) for row in rows])
    elif rows:
        print_table("Differences", ("field", one.id, other.id), rows)
    return 1 if rows else 0


def show_differing_records(one: Iterable[Record], other: Iterable[Record], *, as_json: bool) -> int:
    """Print the records that only one side has, and which are of one key and environment; return 1 if there are any."""
    left, right = set(one), set(other)
    shared = {slot(record) for record in left - right} & {slot(record) for record in right - left}
    rows = [
        (side, "other record of one key" if slot(record) in shared else "only there", *_list_cells(record))
        for side, records in (("A", left - right), ("B", right - left))
        for record in sorted(records, key=lambda record: (str(record.key), record.id))
    ]
    if as_json:
        print_json([{"side": row[0], "what": row[1], "record": row[2]} for row in rows])
    elif rows:
        print_table("Differences", ("in", "what", *LIST_COLUMNS), rows)
    return 1 if rows else 0


def show_change(change: Change, *, as_json: bool) -> None:
    """Say what a write added and replaced."""
    ids = {name: [record.id for record in getattr(change, name)] for name in ("added", "removed", "refused")}
    if as_json:
        print_json(ids)
        return
    added, removed, refused = map(len, ids.values())
    print(f"{added} records added, {removed} replaced, {refused} not taken: there already, or another is preferred")


def show_pruned(found: Sequence[Superfluous], faults: Sequence[Fault], *, dry_run: bool, as_json: bool) -> None:
    """List what was, or would be, removed and why."""
    if as_json:
        records = [{"record": item.record.id, "why": item.reason} for item in found]
        print_json({"removed": not dry_run, "records": records, "lines": [str(fault) for fault in faults]})
        return
    if found:
        rows = [(i.record.id, i.record.environment.device, i.record.key.variant, i.reason) for i in found]
        print_table("Superfluous", ("id", "device", "variant", "why"), rows)
    for fault in faults:
        print(fault)
    print(f"{len(found)} records and {len(faults)} lines {'would be ' if dry_run else ''}removed")


def show_rechecks(found: Sequence[Recheck], *, as_json: bool) -> int:
    """Print what the check found of every record; return 1 if one failed."""
    rows = [(item.record.id, item.record.key.variant, item.record.schedule.slug, _verdict(item)) for item in found]
    status = 1 if any(item.failed for item in found) else 0
    if as_json:
        print_json([dict(zip(("id", "variant", "schedule", "result"), row, strict=True)) for row in rows])
    elif rows:
        print_table("Verified", ("id", "variant", "schedule", "result"), rows)
    else:
        print("no winners to verify")
    return status


def _verdict(item: Recheck) -> str:
    if item.found is None:
        return f"skipped: {item.skipped}"
    return f"FAILED: {item.found.failure}" if item.found.failure else "ok"


def show_replay(found: Replayed, *, as_json: bool) -> None:
    """Print a record's times beside those measured now."""
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
    print_table(f"Record {found.record.id}: {found.record.schedule.slug}", ("what", "ms", "95 % interval"), rows)
    print("the record's schedule stands" if found.faster else "the default schedule is as fast now, within noise")
