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
from m2gen.bench.measure import Result, Timing
from m2gen.bench.words import Call
from m2gen.db import Environment, Estimate, worded
from m2gen.errors import UsageError

SCHEMA = 1
_Count = Annotated[int, Field(ge=1)]
_Ms = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Times:
    """A median in milliseconds with the ends of its 95 % interval, and the GPU's floors for the call."""

    median_ms: _Ms
    low_ms: _Ms
    high_ms: _Ms
    floors_ms: dict[str, float]
    """How long each limit alone makes the call take."""

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.median_ms, self.low_ms, self.high_ms)

    @property
    def parts(self) -> dict[str, float]:
        """The achieved part of each floor: 1 is as fast as that limit allows."""
        return {name: ms / self.median_ms for name, ms in self.floors_ms.items()}


@dataclass(frozen=True)
class Row:
    """One contender on one workload."""

    layer: str
    variant: str
    call: Call
    batch: _Count
    seq: _Count
    steps: _Count
    """Of each timed call: fewer than ``seq`` for loops of PyTorch."""
    contender: str
    schedule: str
    """Slug; empty where the contender is not generated."""
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
class Book:
    """Everything that one run found."""

    environment: Environment
    rows: tuple[Row, ...]
    schema: Annotated[int, Field(ge=SCHEMA, le=SCHEMA)] = SCHEMA
    m2gen: str = __version__


def row_of(result: Result) -> Row:
    """Return a result as a row."""
    entry, found = result.entry, result.found
    workload, contender = entry.workload, entry.contender
    failure = found.failure
    return Row(
        workload.layer,
        workload.variant.key,
        workload.call,
        workload.batch,
        workload.seq,
        entry.steps,
        contender.name,
        contender.schedule.slug if contender.kind.generated else "",
        contender.source,
        _times(result.forward),
        _times(result.step),
        found.extra_bytes,
        found.host_us,
        f"{failure.reason}: {failure.message}" if failure else "",
        entry.arm,
    )


def _times(timing: Timing | None) -> Times | None:
    return None if timing is None else Times(**asdict(timing.estimate), floors_ms=timing.floors_ms)


def speed_ups(rows: Sequence[Row]) -> list[float | None]:
    """Return how many times as fast as the default each row is, a step of its longest timed call compared.

    None where either of the two has no time: it failed the check, say, or is not there.
    """
    base = {_place(row): row for row in rows if row.contender == "default" and not row.failure}
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
def _adapter() -> TypeAdapter[Book]:
    return TypeAdapter(Book)


def dump(book: Book) -> dict[str, Any]:
    """Return the document; each row also says its speed-up and its parts of the floors."""
    rows = []
    for row, speed in zip(book.rows, speed_ups(book.rows), strict=True):
        parts = {name: times.parts for name in ("forward", "step") if (times := getattr(row, name)) is not None}
        rows.append({**asdict(row), "speed_up": speed, "parts_of_floors": parts})
    return {**asdict(book), "rows": rows}


def load(path: Path) -> Book:
    """Read a document; raises UsageError with what is wrong with it, and where."""
    try:
        return _adapter().validate_python(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise UsageError(f"{path}: {worded(error.errors()[0])}") from error
    except ValueError as error:
        raise UsageError(f"{path}: $ must be what `m2gen bench --json` prints ({error})") from error
    except OSError as error:
        raise UsageError(f"{path} must be readable: {error.strerror or error}") from error
