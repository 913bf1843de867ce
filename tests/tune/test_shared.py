"""Several workers on one study: each candidate once, whoever dies."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import postgresql
import pytest
import shared_worker
import simulated
import sqlalchemy as sql
from optuna.exceptions import StorageInternalError
from searches import SPEC, STANDARD, Silent
from simulated import lines
from support import ROOT

from m2gen.db import Database, Environment
from m2gen.errors import TuneError, UsageError
from m2gen.pipeline import plan
from m2gen.pipeline.goals import TuneRequest
from m2gen.pipeline.tune import dry_run, study_name, tune
from m2gen.schedule import AnySchedule, default
from m2gen.spec import Objective
from m2gen.tune.ledger import USUAL, Ledger, Pace, open_ledger
from m2gen.tune.log import SearchProgress
from m2gen.tune.memory import MemoryBound
from m2gen.tune.sampler import Sampler
from m2gen.tune.space import Subject
from m2gen.tune.storage import open_database, open_journal, raced
from m2gen.tune.study import read_journal
from m2gen.tune.trial import Samples, Trial
from m2gen.variant import parse_variant

needs_server = pytest.mark.skipif(
    postgresql.binaries() is None, reason="needs PostgreSQL's server (Debian: apt-get install postgresql)"
)
VARIANT = parse_variant("k64_v16_q1_k1_v84_f84_w84_bf16_carry_approx")
SCHEDULE = default(VARIANT, simulated.DEVICE)
SUBJECT = Subject(VARIANT, simulated.DEVICE, Objective.TRAIN, 8, 4096)
TRIAL = Trial(SCHEDULE, "default", samples=Samples((1.0, 1.1), (2.0, 2.1), 10), worker="one")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Return the URL of a real server's database."""
    with postgresql.server() as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with a spec and a cache of its own."""
    return simulated.place(tmp_path, monkeypatch, SPEC).parent


def _worker(folder: Path, url: str, name: str, trials: int, last: int = -1) -> subprocess.Popen[str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = [sys.executable, str(ROOT / "tests" / "fakes" / "shared_worker.py"), url, name, str(trials), str(last)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, text=True, **pipes)


def _until_met(worker: subprocess.Popen[str]) -> str:
    """Return the output of a worker before it waits for the other."""
    assert worker.stdout is not None
    said = ""
    for line in worker.stdout:
        if line == f"{shared_worker.MET}\n":
            return said
        said += line
    raise AssertionError(f"the worker ended: {said}")


def _go_on(worker: subprocess.Popen[str]) -> None:
    """Tell a worker that it need not wait any longer."""
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()


def _age(url: str, worker: str) -> None:
    """Make a worker's heartbeats as old as if it had been silent for two days, by the database's clock."""
    engine = sql.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        silent = {"at": datetime.now(UTC).replace(tzinfo=None) - timedelta(days=2), "worker": f'%"worker": "{worker}"%'}
        connection.execute(
            sql.text(
                "UPDATE trial_heartbeats SET heartbeat = :at WHERE trial_id IN (SELECT trial_id FROM "
                "trial_user_attributes WHERE key = 'claim' AND value_json LIKE :worker)"
            ),
            silent,
        )
    engine.dispose()


@pytest.mark.parametrize("storage", ["journal", pytest.param("database", marks=needs_server)])
def test_two_workers_one_killed_nothing_lost_or_repeated(
    folder: Path, storage: str, request: pytest.FixtureRequest
) -> None:
    """The other finishes the study, takes over what the dead one was at, and no trial was made twice."""
    url = request.getfixturevalue("url") if storage == "database" else ""
    log = simulated.script(folder / "script.json")
    one, two = _worker(folder, url, "one", trials=40, last=8), _worker(folder, url, "two", trials=40)
    said = [_until_met(worker) for worker in (one, two)]
    for worker in (one, two):
        _go_on(worker)
    assert one.wait() == -signal.SIGKILL
    if url:
        _age(url, "one")
    output = said[1] + _until_met(two)
    _go_on(two)
    assert two.stdout is not None
    output += two.stdout.read()
    assert two.wait() == 0, output
    assert "winner mma_f" in output
    study = _study(url) if url else _in_journal(folder)
    counts = Counter(trial.schedule for trial in study)
    assert set(counts.values()) == {1}
    assert len(counts) >= 40
    screened = Counter(line for line in lines(log) if line.startswith("screen"))
    assert set(screened.values()) == {1}, "the dead worker had finished what it ran"
    begun = {line.split()[1] for line in screened}
    assert begun <= {schedule.slug for schedule in counts}, "everything that was begun has a trial"
    assert Counter(trial.worker for trial in study) == {"one": 8, "two": len(study) - 8}
    assert not (_left(url) if url else _left_in(folder)), "what the dead one had is nobody's any more, and was tried"
    assert len(Database(folder / "db-two").records()) == 1
    assert Database(folder / "db-two").records()[0].provenance.worker == "two"


class Beside(Silent):
    """A watcher in whose search another worker has the default, and has tried it by the third trial."""

    def __init__(self) -> None:
        super().__init__()
        self.others: list[Ledger] = []

    def open(self, storage: str, search: dict[str, Any], worker: str, *, fresh: bool) -> Ledger:
        """Open the ledger of a worker that looks once, after another has claimed the default."""
        self.others = [Ledger(open_database(storage), search, "other")]
        assert self.others[0].claim(STANDARD)
        return Ledger(open_database(storage), search, worker, fresh=fresh, pace=Pace(poll=math.inf))

    def trial(self, trial: Trial, progress: SearchProgress) -> None:
        super().trial(trial, progress)
        if len(self.trials) == 3:
            self.others[0].record(replace(TRIAL, schedule=STANDARD, worker="other"))


def test_a_default_that_another_worker_tried_late(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that ends before it would look again, however fast it was, knows the default and has a winner."""
    simulated.script(folder / "script.json")
    watcher = Beside()
    monkeypatch.setattr(sys.modules["m2gen.pipeline.tune"], "open_ledger", watcher.open)
    request = TuneRequest(Database(folder / "db"), seconds=60, trials=8, storage=_url(folder))
    (tuned,) = tune(plan("one.yaml"), request, simulated.context(), watcher)
    assert tuned.outcome.choice is not None
    assert {trial.worker for trial in tuned.outcome.trials} == {"other", "simulated:0"}


class Leaving(Ledger):
    """A ledger beside which another worker gives up the last candidate, right when this one is about to end."""

    MOMENTS = ("after adopt", "before pending")

    def __init__(self, path: Path, search: dict[str, Any], last: AnySchedule, points: int, moment: str) -> None:
        self._last, self._points, self._moment = last, points, moment
        self._other = Ledger(open_journal(path), search, "other")
        assert self._other.claim(last)
        super().__init__(open_journal(path), search, "this")

    def adopt(self) -> list[AnySchedule]:
        """Look, then have the other leave."""
        found = super().adopt()
        self._leave("after adopt")
        return found

    def pending(self) -> int:
        """Have the other leave, then look."""
        self._leave("before pending")
        return super().pending()

    def _leave(self, moment: str) -> None:
        if moment == self._moment and len(self._recorded) == self._points - 1:
            self._other.close()


@pytest.mark.parametrize("moment", Leaving.MOMENTS)
def test_a_candidate_that_is_given_up_at_the_end_is_tried(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A worker that has tried everything else looks again after the others have gone."""
    simulated.script(folder / "script.json")
    (folder / "one.yaml").write_text(SPEC.replace("state_expansion: 64", "state_expansion: 16"), encoding="utf-8")
    request = TuneRequest(Database(folder / "db"), seconds=600, objective=Objective.INFER)
    (size,) = dry_run(plan("one.yaml"), request, simulated.DEVICE, 1)
    *_, last = size.space.points

    def opened(path: Path, search: dict[str, Any], worker: str, *, fresh: bool) -> Ledger:
        return Leaving(path, search, last, len(size.space.points), moment)

    monkeypatch.setattr(sys.modules["m2gen.pipeline.tune"], "open_ledger", opened)
    (tuned,) = tune(plan("one.yaml"), request, simulated.context(), Silent())
    assert {trial.schedule for trial in tuned.outcome.trials} == {*size.space.points}
    assert [trial.origin for trial in tuned.outcome.trials if trial.schedule == last] == ["adopted"]


class GivingUp(Beside):
    """A watcher in whose search another worker gives a candidate up with the last trial that there may be."""

    LEFT = replace(STANDARD, interval=2 * STANDARD.interval)

    def open(self, storage: str, search: dict[str, Any], worker: str, *, fresh: bool) -> Ledger:
        self.others = [Ledger(open_database(storage), search, "other")]
        return Ledger(open_database(storage), search, worker, fresh=fresh)

    def trial(self, trial: Trial, progress: SearchProgress) -> None:
        Silent.trial(self, trial, progress)
        if len(self.trials) == progress.most:
            assert self.others[0].claim(self.LEFT)
            self.others[0].release(self.LEFT)

    def stage(self, text: str) -> None:
        if text.startswith("final"):
            assert self.others[0].pending() == 0, "nobody has it who cannot try it"


def test_a_search_takes_over_no_more_than_it_may_try(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another gives up is left to others: two such searches would wait for each other until their budgets end."""
    simulated.script(folder / "script.json")
    watcher = GivingUp()
    monkeypatch.setattr(sys.modules["m2gen.pipeline.tune"], "open_ledger", watcher.open)
    request = TuneRequest(Database(folder / "db"), seconds=60, trials=4, storage=_url(folder), sampler=Sampler.RANDOM)
    (tuned,) = tune(plan("one.yaml"), request, simulated.context(), watcher)
    assert len(tuned.outcome.trials) == 4
    assert GivingUp.LEFT not in {trial.schedule for trial in tuned.outcome.trials}
    assert watcher.others[0].adopt() == [GivingUp.LEFT]


def _study(url: str) -> list[Trial]:
    """Return the trials of the one study that a database holds, as Optuna lists them."""
    import optuna
    from optuna.storages import RDBStorage

    storage = RDBStorage(url.replace("postgresql", "postgresql+psycopg"))
    (name,) = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
    return open_ledger(url, {"study": name}, "reader").trials()


def _left(url: str) -> list[str]:
    """Return the candidates of a database's one study that somebody has, or that wait for whoever asks."""
    import optuna
    from optuna.storages import RDBStorage

    return _unfinished(RDBStorage(url.replace("postgresql", "postgresql+psycopg")), optuna)


def _left_in(folder: Path) -> list[str]:
    """Return the same of a journal."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    (path,) = (folder / "cache" / "tune").glob("*.log")
    return _unfinished(JournalStorage(JournalFileBackend(str(path))), optuna)


def _unfinished(storage: Any, optuna: Any) -> list[str]:
    (name,) = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
    trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    return [trial.user_attrs["schedule"] for trial in trials if not trial.state.is_finished()]


def _in_journal(folder: Path) -> list[Trial]:
    (path,) = (folder / "cache" / "tune").glob("*.log")
    ((_, trials),) = read_journal(path)
    return trials


FACTS = {
    "device": "Another GPU",
    "arch": "sm_80",
    "sm_count": 100,
    "driver": "2.0",
    "torch": "2.12",
    "triton": "3.7",
    "ptxas": "13.0",
}
"""Facts of an environment, each of them different from the simulated one's."""


def test_workers_share_a_study_only_on_one_kind_of_gpu_and_toolchain() -> None:
    """Another GPU, driver, torch, Triton or problem names another study; another worker, seed or bound does not."""
    context = simulated.context()
    environments = [replace(simulated.ENVIRONMENT, **{name: value}) for name, value in FACTS.items()]
    others = [replace(context, environment=environment) for environment in environments]
    subjects = [replace(SUBJECT, seq=8192), replace(SUBJECT, batch=64), replace(SUBJECT, objective=Objective.INFER)]
    names = [study_name(SUBJECT, context), *(study_name(SUBJECT, other) for other in others)]
    names += [study_name(subject, context) for subject in subjects]
    assert len(set(names)) == 1 + len(FACTS) + len(subjects)
    assert set(FACTS) == {field.name for field in fields(Environment)}
    beside = replace(context, worker="host:1")
    assert study_name(replace(SUBJECT, memory=MemoryBound()), beside) == names[0]


def _url(path: Path) -> str:
    return f"sqlite:///{path}/study.db"


SEARCH = {"study": "study"}


def _open(path: Path, worker: str, pace: Pace = USUAL) -> Ledger:
    return Ledger(open_database(_url(path)), SEARCH, worker, pace=pace)


def test_two_that_create_the_tables_at_once(tmp_path: Path) -> None:
    """Right before one creates the first table, another creates them all: both have the study."""
    from optuna.storages._rdb.models import StudyModel

    others: list[Ledger] = []
    first = iter([True])

    def before(*_: Any, **__: Any) -> None:
        if next(first, False):
            others.append(_open(tmp_path, "two"))

    sql.event.listen(StudyModel.__table__, "before_create", before)
    try:
        one = _open(tmp_path, "one")
    finally:
        sql.event.remove(StudyModel.__table__, "before_create", before)
    assert one.claim(SCHEDULE)
    one.record(TRIAL)
    assert others[0].trials() == [TRIAL]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("said", "attempts"), [("database is locked", 2), ("unable to open database file", 1)])
def test_what_another_locks_is_tried_again(said: str, attempts: int, wrapped: bool) -> None:
    """An error that passes is waited for, whether Optuna wraps it or not; one that does not is raised at once."""
    made = 0

    def make() -> str:
        nonlocal made
        made += 1
        if made > 1:
            return "made"
        error = sql.exc.OperationalError("CREATE TABLE", {}, Exception(said))
        if wrapped:
            raise StorageInternalError("an exception is raised during the commit") from error
        raise error

    if attempts == 2:
        assert raced(make) == "made"
    else:
        with pytest.raises((sql.exc.OperationalError, StorageInternalError)):
            raced(make)
    assert made == attempts


def test_a_candidate_is_claimed_once(tmp_path: Path) -> None:
    """Whoever comes second is refused, until the first gives it up."""
    one, two = _open(tmp_path, "one"), _open(tmp_path, "two")
    assert one.claim(SCHEDULE)
    assert not two.claim(SCHEDULE)
    assert (one.pending(), two.pending()) == (0, 1)
    one.release(SCHEDULE)
    assert two.claim(SCHEDULE)


def test_workers_see_each_others_trials(tmp_path: Path) -> None:
    """A trial is news to the other worker, once, when it looks again, with everything that is known of it."""
    now = 0.0
    one, two = _open(tmp_path, "one"), _open(tmp_path, "two", Pace(poll=10.0, now=lambda: now))
    assert two.trials() == []
    one.claim(SCHEDULE)
    one.record(TRIAL)
    assert two.news() == [TRIAL]
    other = replace(TRIAL, schedule=replace(SCHEDULE, interval=2 * SCHEDULE.interval))
    one.claim(other.schedule)
    one.record(other)
    now = 9.0
    assert two.news() == []
    now = 10.0
    assert two.news() == [other]
    now = 20.0
    assert two.news() == []
    assert one.news() == []
    assert two.pending() == 0


def test_a_dead_workers_claim_is_taken_over_once(tmp_path: Path) -> None:
    """After the grace period one other worker has it; a finished one is nobody's."""
    dead, two, three = (_open(tmp_path, name) for name in ("dead", "two", "three"))
    dead.claim(SCHEDULE)
    assert two.adopt() == []
    _age(_url(tmp_path), "dead")
    assert [two.adopt(), three.adopt()] == [[SCHEDULE], []]
    two.record(TRIAL)
    assert three.adopt() == []


def test_a_claim_that_is_renewed_is_nobody_elses(tmp_path: Path) -> None:
    """A worker that lives renews what it has, at its pace, and while it runs."""
    now = 0.0
    one, two = _open(tmp_path, "one", Pace(renew=5.0, now=lambda: now)), _open(tmp_path, "two")
    one.claim(SCHEDULE)
    one.news()
    _age(_url(tmp_path), "one")
    now = 5.1
    one.news()
    assert two.adopt() == []
    _age(_url(tmp_path), "one")
    one.begin(SCHEDULE)
    assert two.adopt() == []
    _age(_url(tmp_path), "one")
    assert two.adopt() == [SCHEDULE]


def test_a_trial_whose_worker_died_before_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its result is in the study, so that nobody makes it again."""
    dead, two = _open(tmp_path, "dead"), _open(tmp_path, "two")
    dead.claim(SCHEDULE)
    monkeypatch.setattr(dead, "_ended", lambda *_: True)
    dead.record(TRIAL)
    assert two.pending() == 1
    _age(_url(tmp_path), "dead")
    assert two.adopt() == []
    assert (two.pending(), two.trials()) == (0, [TRIAL])


def test_fresh_forgets_a_study(tmp_path: Path) -> None:
    """Trials and claims go."""
    one = _open(tmp_path, "one")
    one.claim(SCHEDULE)
    one.record(TRIAL)
    again = open_ledger(_url(tmp_path), SEARCH, "one", fresh=True)
    assert again.trials() == []
    assert again.claim(SCHEDULE)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "--storage must be a database URL"),
        ("oracle://host/name", "--storage oracle must have its driver installed"),
        ("nosuch://host/name", "--storage must be a database URL"),
    ],
)
def test_a_url_that_cannot_be_used(url: str, message: str) -> None:
    """The error is one line and the user's status."""
    with pytest.raises(UsageError, match=message):
        open_ledger(url, SEARCH, "one")


def test_a_database_that_cannot_be_reached_does_not_show_the_password(folder: Path) -> None:
    """The error says which database, without the password in its URL."""
    simulated.script(folder / "script.json")
    url = "postgresql://me:secret@127.0.0.1:1/name"
    request = TuneRequest(Database(folder / "db"), seconds=5, trials=2, storage=url)
    with pytest.raises(TuneError, match=r"--storage postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/name") as caught:
        list(tune(plan("one.yaml"), request, simulated.context(), Silent()))
    assert "secret" not in str(caught.value)
