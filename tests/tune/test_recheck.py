"""Records that are checked again on a simulated GPU: which failures are kept, and what serves from then on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import simulated
from searches import SPEC, Silent

from m2gen import pipeline
from m2gen.db import Database, Query, Record, look_up
from m2gen.pipeline.goals import TuneRequest
from m2gen.tune.records import known_failures


class Unseen:
    """Progress that nobody watches."""

    def start(self, stage: str, total: int) -> None: ...
    def advance(self, item: str) -> None: ...
    def finish(self) -> None: ...


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Database, Record]:
    """Return a database with the winner of one search, and that record."""
    spec = simulated.place(tmp_path, monkeypatch, SPEC)
    simulated.script(tmp_path / "script.json")
    database = Database(tmp_path / "db")
    request = TuneRequest(database, seconds=60.0, trials=12)
    list(pipeline.tune(pipeline.plan(str(spec)), request, simulated.context(), Silent()))
    (record,) = database.records()
    return database, record


def served(database: Database, record: Record) -> Record | None:
    """Return the record that serves the calls of one."""
    key, where = record.key, record.environment
    return look_up(database.records(), Query(key.variant, key.objective, where.arch, where.device, key.bucket)).record


@pytest.mark.parametrize("triton", ["of the record", "9.9.9"])
def test_a_record_that_fails_serves_nothing(tuned: tuple[Database, Record], tmp_path: Path, triton: str) -> None:
    """Whatever Triton finds it wrong, no build takes it, and no search with that Triton tries its schedule again."""
    database, record = tuned
    context = simulated.context()
    if triton != "of the record":
        context = replace(context, environment=replace(context.environment, triton=triton))
    assert served(database, record) == record
    simulated.script(tmp_path / "script.json", wrong=[record.schedule.slug])
    (checked,) = pipeline.verify_records(database, [], context, Unseen())
    assert checked.failed
    assert served(database, record) is None
    subject = replace(pipeline.goals.goals(pipeline.plan("one.yaml"), TuneRequest(database), context.device)[0].subject)
    (known,) = known_failures(subject, context.environment, database.records())
    assert known.schedule == record.schedule
    failed = [each.failure for each in database.records() if each.failure]
    assert [failure.message for failure in failed if "with triton" in failure.message] == (
        [] if triton == "of the record" else ["dq of plain must be within 1e-3, got 2e-1, with triton 9.9.9"]
    )


def test_memory_that_others_had_says_nothing_of_a_record(tuned: tuple[Database, Record], tmp_path: Path) -> None:
    """Running out of memory is said, and leaves the record as it is."""
    database, record = tuned
    simulated.script(tmp_path / "script.json", memory=[record.schedule.slug])
    (checked,) = pipeline.verify_records(database, [], simulated.context(), Unseen())
    assert checked.failed
    assert list(database.records()) == [record]
    assert served(database, record) == record
