"""Print records of the tuning database, and why they serve."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from m2gen.cli.show.names import calls, known_names, state_notes, variants_of
from m2gen.cli.show.report import print_json
from m2gen.cli.show.table import Table, print_tables
from m2gen.db import Database, Record, encode, slot
from m2gen.pipeline import Answer, state

LIST_COLUMNS = ("id", "layer", "programs/SM", "schedule", "ms", "speed-up")
FAILED_COLUMNS = ("id", "layer", "schedule", "why")
DIFF_COLUMNS = ("id", "layer", "programs/SM", "device", "ms", "what")
WHY_COLUMNS = ("id", "programs/SM", "schedule", "serves, or why not")


def _document(record: Record) -> dict[str, Any]:
    return {**json.loads(encode(record)), "status": record.status, "state": state(record)}


def show_list(
    database: Database, records: Sequence[Record], spec: str | None, *, everything: bool, as_json: bool
) -> None:
    """Print winners, and with ``everything`` failures; only those of a spec's variants if one is given."""
    known = known_names((record.key.variant for record in records), spec)
    if spec is not None:
        known = {key: known[key] for key in variants_of(spec) if key in known}
    records = [record for record in records if record.key.variant in known]
    if as_json:
        print_json([_document(record) for record in records if everything or record.failure is None])
        return
    winners = [record for record in records if record.failure is None]
    failures = [record for record in records if record.failure is not None]
    print_tables([*list_tables(winners, known), *failure_tables(failures if everything else (), known)])
    if winners or (everything and failures):
        print()
    more = "" if everything or not failures else ", which --all lists"
    print(f"{database.root}: {len(winners)} winners, {len(failures)} failures{more}")


def list_tables(winners: Sequence[Record], names: Mapping[str, str]) -> Iterator[Table]:
    """Yield a table for every GPU and objective."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in winners:
        groups.setdefault((record.environment.device, record.key.objective), []).append(record)
    for (device, objective), having in groups.items():
        rows = [_list_cells(record, names) for record in having]
        yield Table(f"For {objective} on {device}", LIST_COLUMNS, rows, state_notes(having))


def _list_cells(record: Record, names: Mapping[str, str]) -> tuple[Any, ...]:
    key, timing = record.key, record.timing
    what = (record.id, names[key.variant], calls([key.bucket]), record.schedule.describe())
    if timing is None:
        return (*what, "", "")
    tuned = timing.tuned.median_ms
    return (*what, f"{tuned:.3f}", f"{timing.default.median_ms / tuned:.2f}x")


def failure_tables(failures: Sequence[Record], names: Mapping[str, str]) -> Iterator[Table]:
    """Yield a table of schedules that are known to fail for every GPU."""
    for device in dict.fromkeys(record.environment.device for record in failures):
        rows = [
            (r.id, names[r.key.variant], r.schedule.describe(), f"{r.failure.reason}: {r.failure.message}")
            for r in failures
            if r.environment.device == device and r.failure is not None
        ]
        yield Table(f"Known to fail on {device}", FAILED_COLUMNS, rows)


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of every leaf of a document."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{place}.{name}" if place else name)
    elif isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield from _flat(item, f"{place}[{number}]")
    else:
        yield place, "" if value in (None, []) else value


def show_record(record: Record, *, as_json: bool) -> None:
    """Print all fields of a record."""
    if as_json:
        print_json(_document(record))
    else:
        notes = [record.clocks.warning] if record.clocks and record.clocks.warning else []
        print_tables([Table(f"Record {record.id}", ("what", "value"), [*_flat(_document(record))], notes)])


def show_why(answers: Sequence[Answer], spec: str | None, batch: int | None, seq: int | None, *, as_json: bool) -> None:
    """Print the record that serves each query, and why others do not."""
    if as_json:
        print_json([_answer_document(answer) for answer in answers])
        return
    if seq is not None:
        print(f"The length of sequences ({seq}) plays no part in choosing a schedule.")
    names = known_names((answer.query.variant for answer in answers), spec)
    print_tables([why_table(answer, names[answer.query.variant], batch) for answer in answers])


def why_table(answer: Answer, name: str, batch: int | None) -> Table:
    """Return the table of the variant's records, the one that serves first."""
    query, served = answer.query, answer.served
    rows = [_why_cells(served.record, f"serves: {served.tier}")] if served.record else []
    rows += [_why_cells(rejection.record, rejection.reason) for rejection in served.rejected]
    outcome = f"{served.tier} {served.record.id}" if served.record else "default schedule: no record can serve"
    size = f"batch {batch}, " if batch is not None else ""
    device = f"{query.device} ({query.arch}, {answer.sm_count} SMs)" if query.device != query.arch else query.arch
    where = f"{calls([query.bucket])} programs/SM on {device}"
    return Table(f"{name}, {query.objective}, {size}{where}: {outcome}", WHY_COLUMNS if rows else (), rows)


def _why_cells(record: Record, reason: str) -> tuple[Any, ...]:
    return (record.id, calls([record.key.bucket]), record.schedule.describe(), reason)


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
        print_tables([Table("Differences", ("field", one.id, other.id), rows)])
    return 1 if rows else 0


def show_differing_records(one: Iterable[Record], other: Iterable[Record], *, as_json: bool) -> int:
    """Print the records that only one side has, pairing those of one key and environment; return 1 if there are any."""
    left, right = set(one), set(other)
    shared = {slot(record) for record in left - right} & {slot(record) for record in right - left}
    rows = [
        (side, "other record of one key" if slot(record) in shared else "only there", record)
        for side, records in (("A", left - right), ("B", right - left))
        for record in sorted(records, key=lambda record: (str(record.key), record.id))
    ]
    if as_json:
        print_json([{"side": side, "what": what, "record": record.id} for side, what, record in rows])
    elif rows:
        names = known_names(record.key.variant for _, _, record in rows)
        print_tables([Table("Differences", ("in", *DIFF_COLUMNS), [_diff_cells(*row, names) for row in rows])])
    return 1 if rows else 0


def _diff_cells(side: str, what: str, record: Record, names: Mapping[str, str]) -> tuple[Any, ...]:
    ms = "" if record.timing is None else f"{record.timing.tuned.median_ms:.3f}"
    where = (record.id, names[record.key.variant], calls([record.key.bucket]), record.environment.device)
    return (side, *where, ms, what)
