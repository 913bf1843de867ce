"""A run's results as a document, which ``m2gen bench --json`` prints, and ``--from`` and ``--against`` read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, Field, TypeAdapter, ValidationError

from m2gen import __version__
from m2gen.bench.kinds import Axis, Call
from m2gen.bench.ranks.entries import RankDocument
from m2gen.bench.side_by_side import Result, Times
from m2gen.bench.values import VariantName, check_times
from m2gen.db import Environment, message_of
from m2gen.errors import UsageError, among, os_errors_as

SCHEMA = 1
_Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Row:
    """The times of one implementation on one workload."""

    layer: str
    variant: VariantName
    call: Call
    batch: _Count
    seq: _Count
    steps: _Count
    """Steps of each timed call: fewer than ``seq`` for loops of PyTorch."""
    implementation: Annotated[str, Field(validation_alias=AliasChoices("implementation", "contender"))]
    """Name of the implementation; older documents call it the contender."""
    schedule: str
    """Slug of the schedule; empty if the implementation is not generated."""
    source: str
    forward: Times | None
    step: Times | None
    """Times of forward and backward together; None for decoding."""
    extra_bytes: int
    host_us: float | None
    failure: str
    """Why there are no times: the check, the compiler, the GPU's memory, a crash or a hang."""
    arm: int = 0
    unverified: str = ""
    """Why the check failed of an implementation that was timed all the same."""
    packed: bool = False
    """Whether ``batch`` sequences of 1 to ``seq`` tokens were packed."""


@dataclass(frozen=True)
class Document:
    """All results of one run."""

    environment: Environment
    rows: tuple[Row, ...]
    schema: Annotated[int, Field(ge=SCHEMA, le=SCHEMA)] = SCHEMA
    m2gen: str = __version__


@dataclass(frozen=True)
class CurvePoint:
    """The times of all implementations at one point of an axis."""

    x: int
    fitted: bool
    """Whether lines are fitted to it."""
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Sweep:
    """The results of a sweep of one layer."""

    axis: Axis
    layer: str
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class SweepDocument:
    """The sweeps of one run."""

    environment: Environment
    sweeps: tuple[Sweep, ...]


Shape = TypeVar("Shape")
_DOCUMENT = TypeAdapter(Document)
_SWEEPS = TypeAdapter(SweepDocument)


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
        str(found.unverified or ""),
        workload.packed,
    )


def speed_ups(rows: Sequence[Row]) -> list[float | None]:
    """Return for each row how many times as fast as the default it is, by time per step of its longest timed call.

    None if either of the two has no time, because it failed or is not there.
    """
    base = {_place(row): row for row in rows if row.implementation == "default" and not row.failure}
    return [_speed_up(row, base.get(_place(row))) for row in rows]


def besides(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Return each row's time over those of the calls beside which it stands (``Call.beside``), by their names.

    They are of the same implementation on the same batch; calls without a time are left out.
    """
    times = {_beside(row, row.call): row.forward for row in rows if row.forward is not None and not row.failure}
    found = []
    for row in rows:
        mine, others = (
            times.get(_beside(row, row.call)),
            {call: times.get(_beside(row, call)) for call in row.call.beside},
        )
        found.append({str(call): mine.median_ms / other.median_ms for call, other in others.items() if mine and other})
    return found


def _beside(row: Row, call: Call) -> tuple[object, ...]:
    length = row.seq if call is Call.SEQUENCE else 0  # a call that has a partner has one length
    return (row.layer, row.variant, row.batch, row.packed, row.implementation, row.arm, call, length)


def _place(row: Row) -> tuple[object, ...]:
    return (row.layer, row.variant, row.call, row.batch, row.seq, row.packed)


def _speed_up(row: Row, base: Row | None) -> float | None:
    if base is None or row.failure:
        return None
    mine, other = row.step or row.forward, base.step or base.forward
    if mine is None or other is None:
        return None
    return (other.median_ms / base.steps) / (mine.median_ms / row.steps)


def dump(document: Document) -> dict[str, Any]:
    """Return the document as JSON values.

    Each row also has its speed-up and its achieved fractions of the floors, and its time over those that it stands
    beside.
    """
    rows = []
    for row, speed, beside in zip(document.rows, speed_ups(document.rows), besides(document.rows), strict=True):
        parts = {name: times.parts for name in ("forward", "step") if (times := getattr(row, name)) is not None}
        values = {name: value for name, value in asdict(row).items() if name != "packed" or row.packed}
        values |= {"beside": beside} if row.call.beside else {}
        rows.append({**values, "speed_up": speed, "parts_of_floors": parts})
    return {**asdict(document), "rows": rows}


def load(path: Path) -> Document:
    """Read a document of workloads; raises UsageError with what is wrong with it, and where."""
    return valid(_DOCUMENT, read_json(path), path)


def run_of(content: Any, path: Path) -> Document | SweepDocument:
    """Return the document of workloads or of sweeps that a file's JSON is; raises UsageError with what is wrong."""
    if isinstance(content, dict) and "sweeps" in content:
        return valid(_SWEEPS, content, path)
    found = valid(_DOCUMENT, content, path)
    check_times(found.rows, "rows", path)
    return found


def ranks_of(content: Any, path: Path) -> RankDocument | None:
    """Return the document of layers over ranks that a file's JSON is, None for another; raises as ``run_of`` does."""
    over_ranks = isinstance(content, dict) and "link" in content
    return valid(TypeAdapter(RankDocument), content, path) if over_ranks else None


def asked_of(names: Iterable[str], layers: Sequence[str]) -> Sequence[str]:
    """Return ``layers``, or all of a run's ``names`` if none is given; raises UsageError for one that is not there."""
    having = dict.fromkeys(names)
    for name in layers:
        if name not in having:
            raise UsageError(f"--layer must be {among(having)}, got {name!r}")
    return layers or tuple(having)


def ranks_of_layers(run: RankDocument, layers: Sequence[str]) -> RankDocument:
    """Return the part of a run over ranks that is about ``layers``, as ``of_layers`` does."""
    asked = asked_of((row.layer for row in run.rows), layers)
    kept = [(row, case) for row, case in zip(run.rows, run.cases, strict=False) if row.layer in asked]
    return replace(run, rows=tuple(row for row, _ in kept), cases=tuple(case for _, case in kept))


def read_json(path: Path) -> Any:
    """Read JSON; raises UsageError for a file that cannot be read or is none."""
    try:
        with os_errors_as(UsageError, f"{path} must be readable"):
            return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: $ must be what `m2gen bench --json` prints ({error})") from error


def valid(adapter: TypeAdapter[Shape], content: Any, path: Path) -> Shape:
    """Return what JSON values describe; raises UsageError with what is wrong with them, and where."""
    try:
        return adapter.validate_python(content)
    except ValidationError as error:
        raise UsageError(f"{path}: {message_of(error.errors()[0])}") from error


def of_layers(run: Document | SweepDocument, layers: Sequence[str]) -> Document | SweepDocument:
    """Return the part of a run that is about ``layers``, or all of it if none is given.

    Raises UsageError for a layer that the run does not have.
    """
    asked = asked_of((each.layer for each in (run.rows if isinstance(run, Document) else run.sweeps)), layers)
    if isinstance(run, Document):
        return replace(run, rows=tuple(row for row in run.rows if row.layer in asked))
    return replace(run, sweeps=tuple(sweep for sweep in run.sweeps if sweep.layer in asked))
