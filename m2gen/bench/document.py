"""A run's results as a document: what ``m2gen bench --json`` prints, and ``--against`` reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from m2gen import __version__
from m2gen.bench.kinds import Call
from m2gen.bench.side_by_side import Result, Times
from m2gen.db import Environment, message_of
from m2gen.errors import UsageError

SCHEMA = 1
_Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Row:
    """One implementation, a implementation in documents, on one workload."""

    layer: str
    variant: str
    call: Call
    batch: _Count
    seq: _Count
    steps: _Count
    """Of each timed call: fewer than ``seq`` for loops of PyTorch."""
    implementation: str
    schedule: str
    """Slug; empty where the implementation is not generated."""
    source: str
    forward: Times | None
    step: Times | None
    """Forward and backward; none of decoding."""
    extra_bytes: int
    host_us: float | None
    failure: str
    """Why there are no times: of the check, the compiler, the GPU's memory, a crash or a hang."""
    arm: int = 0


@dataclass(frozen=True)
class Document:
    """Everything that one run found."""

    environment: Environment
    rows: tuple[Row, ...]
    schema: Annotated[int, Field(ge=SCHEMA, le=SCHEMA)] = SCHEMA
    m2gen: str = __version__


def row_of(result: Result) -> Row:
    """Return a result as a row."""
    entry, found = result.entry, result.found
    workload, implementation = entry.workload, entry.implementation
    return Row(
        workload.layer,
        workload.variant.key,
        workload.call,
        workload.batch,
        workload.seq,
        entry.steps,
        implementation.name,
        implementation.schedule.slug if implementation.kind.generated else "",
        implementation.source,
        result.forward,
        result.step,
        found.extra_bytes,
        found.host_us,
        str(found.failure or ""),
        entry.arm,
    )


def speed_ups(rows: Sequence[Row]) -> list[float | None]:
    """Return how many times as fast as the default each row is, a step of its longest timed call compared.

    None where either of the two has no time: it failed the check, say, or is not there.
    """
    base = {_place(row): row for row in rows if row.implementation == "default" and not row.failure}
    return [_speed_up(row, base.get(_place(row))) for row in rows]


def _place(row: Row) -> tuple[object, ...]:
    return (row.layer, row.variant, row.call, row.batch, row.seq)


def _speed_up(row: Row, base: Row | None) -> float | None:
    if base is None or row.failure:
        return None
    mine, other = row.step or row.forward, base.step or base.forward
    if mine is None or other is None:
        return None
    return (other.median_ms / base.steps) / (mine.median_ms / row.steps)


@cache
def _adapter() -> TypeAdapter[Document]:
    return TypeAdapter(Document)


def dump(document: Document) -> dict[str, Any]:
    """Return the document; each row also says its speed-up and its parts of the floors."""
    rows = []
    for row, speed in zip(document.rows, speed_ups(document.rows), strict=True):
        parts = {name: times.parts for name in ("forward", "step") if (times := getattr(row, name)) is not None}
        rows.append({**asdict(row), "speed_up": speed, "parts_of_floors": parts})
    return {**asdict(document), "rows": rows}


def load(path: Path) -> Document:
    """Read a document; raises UsageError with what is wrong with it, and where."""
    try:
        return _adapter().validate_python(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise UsageError(f"{path}: {message_of(error.errors()[0])}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: $ must be what `m2gen bench --json` prints ({error})") from error
    except OSError as error:
        raise UsageError(f"{path} must be readable: {error.strerror or error}") from error
