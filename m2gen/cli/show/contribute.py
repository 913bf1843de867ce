"""Print what a contribution holds, what it changes, and what is kept back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m2gen.cli.show.names import calls, known_names
from m2gen.cli.show.report import print_json
from m2gen.cli.show.table import Table, print_tables
from m2gen.db import Served
from m2gen.pipeline.contribute import Contribution, Effect

COLUMNS = ("layer", "GPU", "programs/SM", "speed-up", "served so far by", "then by", "record")


def show_contribution(file: Path, found: Contribution, *, as_json: bool) -> None:
    """Print a line for each winner: its GPU and calls, its speed-up, and what serves them before and after."""
    if as_json:
        print_json(_document(file, found))
        return
    records = (*(effect.record for effect in found.effects), *(item.record for item in found.kept))
    names = known_names(record.key.variant for record in records)
    rows = [(names[effect.record.key.variant], *_cells(effect)) for effect in found.effects]
    kept = [(item.record.id, names[item.record.key.variant], item.reason) for item in found.kept]
    tables = [Table("What merging changes", COLUMNS, rows)] if rows else []
    print_tables([*tables, *([Table("Kept back", ("id", "layer", "why"), kept)] if kept else [])])
    failed = len(found.records) - len(found.effects)
    print(f"{file}: {len(found.effects)} winners, {failed} failures; {len(found.kept)} kept back")


def _cells(effect: Effect) -> tuple[Any, ...]:
    record = effect.record
    assert record.timing is not None
    ratio = record.timing.default.median_ms / record.timing.tuned.median_ms
    served = (_served(effect.before), _served(effect.after))
    return (record.environment.device, calls([record.key.bucket]), f"{ratio:.2f}x", *served, record.id)


def _served(served: Served) -> str:
    return str(served.tier) if served.record is None else f"{served.tier} {served.record.id}"


def _document(file: Path, found: Contribution) -> dict[str, Any]:
    effects = [
        {"record": effect.record.id, "before": _served(effect.before), "after": _served(effect.after)}
        for effect in found.effects
    ]
    kept = [{"record": item.record.id, "why": item.reason} for item in found.kept]
    return {"file": str(file), "records": [record.id for record in found.records], "effects": effects, "kept": kept}
