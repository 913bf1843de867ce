"""A record of the tuning database: one schedule for one key on one GPU, measured and verified, or known to fail.

The key is of a recurrence, or of one of the kernels around it, whose schedule is its tiles.

Records are canonical lines of JSON: a record has exactly one text, and its id is the hash of that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from m2gen.db.fields import Clocks, Environment, Estimate, Failure, Key, Provenance, Sizes, Status, TensorError, Timing
from m2gen.device import limits
from m2gen.errors import DatabaseError
from m2gen.schedule import AnySchedule, Family
from m2gen.schedule.layer_knobs import LayerKernel
from m2gen.schedule.tunable import Tunable

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SCHEMA = 3
"""Version of the records' format; a line of another version is kept, and not used."""
OLDER = (1, 2)
"""Versions whose schedules had layouts in place of a family."""
LONGEST_LINE = 16384
"""Maximum length of a line in characters; m2gen writes about two thousand."""


class NotARecord(ValueError):
    """A line is not a record; the message is ``$.place must ..., got ...``."""


@dataclass(frozen=True)
class Record:
    """One line of the database."""

    key: Key
    environment: Environment
    provenance: Provenance
    problem: Sizes
    schedule: AnySchedule
    timing: Timing | None = None
    """Times of a winner; None for a failure."""
    errors: tuple[TensorError, ...] = ()
    failure: Failure | None = None
    clocks: Clocks | None = None
    """Clocks of the winner's search; None where they are not known, which is then not in the line."""

    @property
    def tunable(self) -> Tunable:
        """What the schedule runs; raises ValueError if the key is not that of anything."""
        return Tunable.parse(self.key.variant)

    @property
    def status(self) -> Status:
        return Status.WINNER if self.failure is None else Status.FAILED

    @cached_property
    def id(self) -> str:
        """12 hex digits of the content's hash; raises DatabaseError if the content is not valid."""
        return _written(self)[0]


_ADAPTER = TypeAdapter(Record)


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _checked(record: Record) -> Record:
    """Return a record as it would be read back, numbers in their fields' types; raises NotARecord."""
    try:
        return _parse(json.dumps(asdict(record), allow_nan=False))
    except ValueError as error:
        raise error if isinstance(error, NotARecord) else NotARecord(f"$ must hold finite numbers ({error})") from error


def _line(record: Record) -> tuple[str, str]:
    """Return the id and the line of a record that was read."""
    content = {**asdict(record), "schema": SCHEMA}
    if record.clocks is None:
        del content["clocks"]  # records from before there were any have no such key
    for name, value in getattr(record.schedule, "IMPLIED", {}).items():
        side, _, knob = name.partition(".")
        if content["schedule"][side][knob] == value:
            del content["schedule"][side][knob]  # likewise
    identity = hashlib.sha256(_dump(content).encode()).hexdigest()[:12]
    return identity, _dump({**content, "id": identity})


def _parse(text: str) -> Record:
    """Return the record in ``text``, with types and relations checked; raises NotARecord."""
    try:
        record = _ADAPTER.validate_json(text, strict=True)
    except ValidationError as error:
        raise NotARecord(message_of(error.errors()[0])) from error
    for problem in _contradictions(record):
        raise NotARecord(problem)
    return record


def message_of(error: ErrorDetails) -> str:
    """Return an error of pydantic as ``$.place must ..., got ...``."""
    families = (*Family, *LayerKernel)
    place = (part for part in error["loc"] if part not in families)  # pydantic names the family, which is no key
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    must = re.sub(r"^(Input|String|Value) should", "must", error["msg"])
    must = re.sub(r" a( valid)? dictionary( or an instance of \w+)?$", " an object", must)
    if error["type"] == "missing":
        return f"${''.join(parts)} is missing"
    if error["type"].startswith("union_tag"):
        must = f"must have the family {', '.join(families)}"
    given = repr(error["input"])
    return f"${''.join(parts)} {must}, got {given if len(given) <= 60 else given[:57] + '...'}"


def _contradictions(record: Record) -> Iterator[str]:
    """Yield the contradictions between values each of which is valid by itself."""
    try:
        tunable = record.tunable
    except ValueError as error:
        yield f"$.key.variant {error}"
        return
    for reason in tunable.problems(record.schedule, limits(record.environment.arch)):
        yield f"$.schedule.{reason}"
    bucket = tunable.bucket(record.problem.sequences, record.environment.sm_count)
    if bucket != record.key.bucket:
        yield f"$.key.bucket must be {bucket} for the problem and the GPU, got {record.key.bucket}"
    if (record.timing is None) != (record.failure is not None):
        yield "$ must have either timing or failure, got " + ("none" if record.failure is None else "both")
    if record.clocks is not None and record.timing is None:
        yield "$.clocks must be of a record with timing, got a failure"
    if record.timing is not None:
        yield from _impossible(record.timing.tuned, "tuned")
        yield from _impossible(record.timing.default, "default")
        if (record.timing.backward_ms is None) is tunable.times_backward(record.key.objective):
            yield f"$.timing.backward_ms must fit objective {record.key.objective}, got {record.timing.backward_ms}"
        for found in record.errors:
            if found.error > found.budget:
                yield f"$.errors must be within their budgets, got {found.tensor} {found.error:.2e}"


def _impossible(estimate: Estimate, name: str) -> Iterator[str]:
    if not estimate.low_ms <= estimate.median_ms <= estimate.high_ms:
        yield f"$.timing.{name} must have low_ms <= median_ms <= high_ms, got {estimate.low_ms} and {estimate.high_ms}"


def _written(record: Record) -> tuple[str, str]:
    try:
        identity, line = _line(_checked(record))
        _check_length(line)
        return identity, line
    except NotARecord as error:
        raise DatabaseError(f"a record of {record.key.variant}: {error}") from error


def _check_length(line: str) -> None:
    if len(line) > LONGEST_LINE:
        raise NotARecord(f"$ must take at most {LONGEST_LINE} characters, got {len(line)}")


def encode(record: Record) -> str:
    """Return the record's line, without its end; raises DatabaseError if the record is not valid."""
    return _written(record)[1]


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise NotARecord(f"$ must be JSON ({error})") from error
    if not isinstance(value, dict):
        raise NotARecord(f"$ must be a JSON object, got {type(value).__name__}")
    return value


def decode(line: str) -> Record:
    """Return the record of a line; raises NotARecord for anything that ``encode`` would not have written."""
    _check_length(line)
    value = _object(line)
    schema, identity = value.pop("schema", None), value.pop("id", None)
    if schema != SCHEMA:
        remedy = " (m2gen tune measures again; m2gen db prune --unreadable removes the line)" if schema in OLDER else ""
        raise NotARecord(f"$.schema must be {SCHEMA}, got {str(schema)[:20]!r}{remedy}")
    record = _parse(json.dumps(value))
    expected, text = _line(record)
    if identity != expected:
        raise NotARecord(f"$.id must be {expected}, which the content gives, got {str(identity)[:20]!r}")
    if text != line:
        raise NotARecord("$ must be canonical: sorted keys, single spaces, no other keys")
    record.__dict__["id"] = expected  # the cached property, which would write the line again
    return record
