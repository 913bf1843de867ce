"""Records that are checked again on a simulated GPU: which failures are kept, and what serves from then on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simulated
from searches import NEIGHBOUR, SPEC, Silent

from m2gen import pipeline
from m2gen.db import Database, Failure, Query, Reason, Record, Sizes, look_up
from m2gen.errors import TuneError
from m2gen.kernels.identity import identity_of
from m2gen.pipeline import recheck
from m2gen.pipeline.goals import TuneRequest
from m2gen.pipeline.tune import header_of
from m2gen.schedule import parse
from m2gen.tune.ledger import open_ledger
from m2gen.tune.records import known_failures
from m2gen.tune.trial import KNOWN, Measurement, Task


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


WRONG = Failure.of(Reason.WRONG, "y must be within 1e-3, got 2e-1" + ", and so on" * 99)


def beside(record: Record) -> Record:
    """Return a record of other calls with another schedule."""
    schedule = parse(NEIGHBOUR)
    kernel = identity_of(record.tunable.variant, schedule)
    provenance = replace(record.provenance, kernel=kernel)
    return replace(record, schedule=schedule, provenance=provenance, problem=replace(record.problem, seq=2048))


def finding(patch: pytest.MonkeyPatch, *results: Measurement | BaseException) -> None:
    """Have checks give these results, one after the other."""
    left = iter(results)

    def run(groups: Iterable[Iterable[Any]], *_: object) -> Iterator[tuple[Any, Any]]:
        for task in (task for group in groups for task in group):
            result = next(left) if isinstance(task, Task) else None
            if isinstance(result, BaseException):
                raise result
            yield task, result

    patch.setattr(recheck, "run_isolated", run)


def test_a_long_message_is_kept_as_far_as_it_fits(
    tuned: tuple[Database, Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is noted of the Triton that found a record wrong makes its message no longer than a line may have."""
    database, record = tuned
    context = simulated.context()
    finding(monkeypatch, Measurement(failure=WRONG))
    other = replace(context, environment=replace(context.environment, triton="9.9.9"))
    pipeline.verify_records(database, [], other, Unseen())
    assert served(database, record) is None
    messages = sorted(each.failure.message for each in database.records() if each.failure)
    assert messages == sorted([WRONG.message, f"{WRONG.message[:-19]}, with triton 9.9.9"])


def test_a_gpu_of_another_size_finds_a_record_wrong(
    tuned: tuple[Database, Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One product name may be of GPUs with fewer multiprocessors, for which the same problem is of other calls."""
    database, record = tuned
    context = simulated.context(replace(simulated.DEVICE, sm_count=20))
    finding(monkeypatch, Measurement(failure=WRONG))
    (checked,) = pipeline.verify_records(database, [], context, Unseen())
    assert checked.failed
    assert served(database, record) is None
    (failed,) = [each for each in database.records() if each.failure]
    assert (failed.environment.sm_count, failed.key.bucket) == (20, ">8")


@pytest.mark.parametrize("end", [KeyboardInterrupt(), Measurement(stopped="No space left on device")], ids=str)
def test_what_was_found_before_the_end_is_kept(
    tuned: tuple[Database, Record], monkeypatch: pytest.MonkeyPatch, end: Measurement | BaseException
) -> None:
    """Ctrl-C or a full disk in the middle of the checks: what an earlier one found wrong serves nothing."""
    database, record = tuned
    database.add([beside(record)])
    finding(monkeypatch, Measurement(failure=WRONG), end)
    with pytest.raises((KeyboardInterrupt, TuneError)):
        pipeline.verify_records(database, [], simulated.context(), Unseen())
    (failed,) = [each for each in database.records() if each.failure]
    assert failed.schedule in (record.schedule, beside(record).schedule)


def test_what_cannot_be_checked_is_skipped(tuned: tuple[Database, Record], monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of a packed batch keeps no other from its check; a failure that is asked for by its id is told."""
    database, record = tuned
    packed = replace(beside(record), problem=Sizes(1, 64, (64,) * record.problem.batch))
    failed = replace(beside(record), timing=None, errors=(), failure=WRONG, schedule=parse(NEIGHBOUR))
    database.add([packed])
    finding(monkeypatch, *[Measurement()] * 2)
    found = {each.record: each for each in pipeline.verify_records(database, [], simulated.context(), Unseen())}
    assert found[packed].skipped == "of a packed batch, not of equal sequences"
    assert found[record].found == Measurement()
    database.add([failed])
    ids = [failed.id, record.id]
    told, other = pipeline.verify_records(database, ids, simulated.context(), Unseen())
    assert (told.record, told.skipped) == (failed, "records a failure")
    assert other.found == Measurement()


def test_a_search_that_goes_on_knows_what_was_found_wrong_since(tuned: tuple[Database, Record], tmp_path: Path) -> None:
    """Its journal says that the schedule passed; it wins no more, since its record would serve nothing."""
    database, record = tuned
    simulated.script(tmp_path / "script.json", wrong=[record.schedule.slug])
    pipeline.verify_records(database, [], simulated.context(), Unseen())
    log = simulated.script(tmp_path / "later.json")
    request = TuneRequest(database, seconds=60.0, trials=12)
    (again,) = pipeline.tune(pipeline.plan("one.yaml"), request, simulated.context(), Silent())
    assert again.outcome.choice is not None
    assert again.outcome.choice.winner != record.schedule
    (won,) = [each for each in again.records if not each.failure]
    assert served(database, record) == won
    assert not [line for line in simulated.lines(log) if line.endswith(record.schedule.slug)]


def test_a_search_takes_over_nothing_that_is_known_to_fail(tuned: tuple[Database, Record], tmp_path: Path) -> None:
    """What a search gave up before its schedule failed elsewhere is not tried, and waits for nobody."""
    database, record = tuned
    context, request = simulated.context(), TuneRequest(database, seconds=60.0, trials=14)
    planned = pipeline.plan("one.yaml")
    subject = pipeline.goals.goals(planned, request, context.device)[0].subject
    left = replace(record.schedule, interval=2 * record.schedule.interval)
    (journal,) = (tmp_path / "cache" / "tune").glob("*.log")
    header = header_of(subject, context)
    with closing(open_ledger(journal, header, "other")) as ledger:
        assert ledger.claim(left)
    kernel = replace(record.provenance, kernel=identity_of(record.tunable.variant, left))
    database.add([replace(record, schedule=left, provenance=kernel, timing=None, errors=(), failure=WRONG)])
    log = simulated.script(tmp_path / "later.json")
    (again,) = pipeline.tune(planned, request, context, Silent())
    assert not [line for line in simulated.lines(log) if line.endswith(left.slug)]
    assert [trial.origin for trial in again.outcome.trials if trial.schedule == left] == [KNOWN]
    with closing(open_ledger(journal, header, "other")) as ledger:
        assert ledger.adopt() == []
