"""The whole search with a simulated GPU: what hangs, crashes, lies or shakes costs one candidate, never the search."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import simulated
from searches import BEST, DEFAULT, NEIGHBOUR, SPEC, Silent, beside
from simulated import lines

from m2gen.db import Database, Failure, Reason
from m2gen.errors import DatabaseError, TuneError
from m2gen.measure import lock
from m2gen.pipeline import plan
from m2gen.pipeline.goals import TuneRequest
from m2gen.pipeline.tune import Tuned, tune
from m2gen.schedule import Schedule, default, parse
from m2gen.spec import Objective
from m2gen.tune.final import FEWEST_ROUNDS, FINALISTS
from m2gen.tune.log import Limits, SearchProgress
from m2gen.tune.sampler import Sampler
from m2gen.tune.services import TuningContext
from m2gen.tune.trial import Measurement, Step, Task, Trial


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a spec of one workload in an empty working directory, with a cache and a script of its own."""
    return simulated.place(tmp_path, monkeypatch, SPEC)


def search(
    spec: Path,
    context: TuningContext | None = None,
    watcher: Silent | None = None,
    trials: int | None = 24,
    seconds: float = 60.0,
) -> Tuned:
    """Run the one search of the spec."""
    request = TuneRequest(Database(spec.parent / "db"), seconds=seconds, trials=trials)
    (tuned,) = tune(plan(str(spec)), request, context or simulated.context(), watcher or Silent())
    return tuned


def standard(tuned: Tuned) -> Schedule:
    """Return the default schedule of a search."""
    return default(tuned.goal.subject.variant, tuned.goal.subject.device)


def of(tuned: Tuned, slug: str) -> Trial:
    """Return the trial of a schedule."""
    return next(trial for trial in tuned.outcome.trials if trial.schedule.slug == slug)


def test_finds_a_faster_schedule_and_records_it(spec: Path) -> None:
    """The winner has the least time of all trials, beats the default, and is what the database then holds."""
    simulated.script(spec.parent / "script.json")
    tuned = search(spec, trials=50)
    choice = tuned.outcome.choice
    assert choice is not None
    medians = {trial.schedule: trial.median_ms for trial in tuned.outcome.trials if trial.median_ms}
    assert medians[choice.winner] <= min(medians.values()) * 1.005
    assert choice.estimates[choice.winner].high_ms < choice.estimates[standard(tuned)].low_ms
    (record,) = Database(spec.parent / "db").records()
    assert record.schedule == choice.winner
    assert record.timing is not None
    assert record.timing.default.median_ms == pytest.approx(3.75, rel=0.01)
    assert record.timing.forward_ms + (record.timing.backward_ms or 0) == pytest.approx(
        record.timing.tuned.median_ms, rel=0.01
    )
    assert record.environment == simulated.ENVIRONMENT
    assert record.provenance.worker == "simulated:0"
    assert {error.tensor: error.error for error in record.errors} == {"dq": 3e-4, "y": 2e-4}, "worst of both gates"


def test_no_candidate_reaches_the_gpu_twice_in_a_search(spec: Path) -> None:
    """Every trial is another candidate, the default is the first."""
    log = simulated.script(spec.parent / "script.json")
    tuned = search(spec)
    screened = [line for line in lines(log) if line.startswith("screen")]
    assert len(screened) == len(set(screened)) == 24 == len(tuned.outcome.trials)
    assert screened[0] == f"screen {standard(tuned).slug}"


def test_hanging_and_crashing_candidates_cost_themselves(spec: Path) -> None:
    """In worker processes: the hang is stopped, the crash replaced, both are recorded and never tried again."""
    hang, crash = beside(rows=16), beside(rows=64)
    log = simulated.script(spec.parent / "script.json", hang=[hang], crash=[crash])
    tuned = search(spec, simulated.context(inline=False), trials=11)
    found = {slug: of(tuned, slug).failure for slug in (hang, crash)}
    assert found[hang] is not None
    assert (found[hang].reason, found[hang].message) == (Reason.HANG, f"took longer than {simulated.SECONDS:g} s")
    assert found[crash] is not None
    assert (found[crash].reason, found[crash].message) == (Reason.CRASH, "its process ended with SIGSEGV")
    assert sum(trial.median_ms is not None for trial in tuned.outcome.trials) == 9
    failed = {record.schedule.slug for record in Database(spec.parent / "db").records() if record.failure}
    assert failed == {hang, crash}
    for path in (spec.parent / "cache" / "tune").iterdir():
        path.unlink()  # so that only the database knows
    before = len(lines(log))
    again = search(spec, trials=14)
    assert {of(again, hang).origin, of(again, crash).origin} == {"known"}
    assert not {f"screen {hang}", f"screen {crash}"} & set(lines(log)[before:])


def test_a_sticky_error_costs_the_candidate_that_made_it(spec: Path) -> None:
    """An error that stays with its process: that is replaced, the candidate recorded, and every other one measured."""
    bad = beside(rows=16)
    log = simulated.script(spec.parent / "script.json", sticky=[bad])
    tuned = search(spec, simulated.context(inline=False, compilers=1), trials=12)  # of two, either may be first
    screened = [line.split()[1] for line in lines(log) if line.startswith("screen")]
    assert len(screened) == len(set(screened)) == 12
    assert screened.index(bad) < 11, "others come after it"
    failure = Failure(Reason.CRASH, "AcceleratorError: CUDA error: an illegal memory access was encountered")
    assert {t.schedule.slug: t.failure for t in tuned.outcome.trials if t.failure} == {bad: failure}
    assert sum(trial.median_ms is not None for trial in tuned.outcome.trials) == 11
    assert {r.schedule.slug: r.failure for r in Database(spec.parent / "db").records() if r.failure} == {bad: failure}
    assert tuned.outcome.choice is not None


def test_the_fastest_is_refused_where_it_is_wrong(spec: Path) -> None:
    """A candidate that is over its budget is never timed, whatever its time would be."""
    log = simulated.script(spec.parent / "script.json", wrong=[NEIGHBOUR], ms={NEIGHBOUR: 0.5})
    tuned = search(spec)
    trial = of(tuned, NEIGHBOUR)
    assert trial.failure is not None
    assert trial.failure.reason is Reason.WRONG
    assert trial.samples is None
    assert f"time {NEIGHBOUR}" not in lines(log)
    assert tuned.outcome.choice is not None
    assert tuned.outcome.choice.winner.slug != NEIGHBOUR


def test_a_finalist_that_fails_on_held_out_problems_is_out(spec: Path) -> None:
    """It passed the screening as the fastest by far; the final's gate refuses it, and the record says so."""
    simulated.script(spec.parent / "script.json", wrong_held_out=[NEIGHBOUR], ms={NEIGHBOUR: 0.5})
    tuned = search(spec)
    assert of(tuned, NEIGHBOUR).failure is not None
    assert tuned.outcome.choice is not None
    assert tuned.outcome.choice.winner.slug != NEIGHBOUR
    reasons = {r.schedule.slug: r.failure.reason for r in Database(spec.parent / "db").records() if r.failure}
    assert reasons == {NEIGHBOUR: Reason.WRONG}


def test_a_default_that_cannot_be_used_has_no_winner_beside_it(spec: Path) -> None:
    """Nothing can be compared: no record of a winner, and the failure is kept."""
    simulated.script(spec.parent / "script.json", wrong=[DEFAULT])
    tuned = search(spec, trials=5)
    assert standard(tuned).slug == DEFAULT
    assert tuned.outcome.choice is None
    assert [record.schedule.slug for record in tuned.records] == [DEFAULT]


def test_noise_is_no_speed_up(spec: Path) -> None:
    """Every candidate takes what the default takes, give or take, one a good deal: the default stays, among ties."""
    simulated.script(spec.parent / "script.json", every=3.75, noisy={NEIGHBOUR: 0.3})
    tuned = search(spec, trials=20)
    choice = tuned.outcome.choice
    assert choice is not None
    assert choice.winner == standard(tuned)
    assert len(choice.ties) > 1
    assert tuned.records[0].schedule == standard(tuned)


def test_what_cannot_launch_never_reaches_the_gpu(spec: Path) -> None:
    """A candidate over the target's limits is excluded by its compilation."""
    log = simulated.script(spec.parent / "script.json", unlaunchable=[NEIGHBOUR])
    tuned = search(spec)
    failure = of(tuned, NEIGHBOUR).failure
    assert failure is not None
    assert failure.reason is Reason.LAUNCH
    assert f"screen {NEIGHBOUR}" not in lines(log)


def test_the_same_machine_code_is_timed_once(spec: Path) -> None:
    """A second name of a binary gets the trial of the first."""
    twin = beside(rows=16)
    log = simulated.script(spec.parent / "script.json", same={twin: "code", NEIGHBOUR: "code"})
    tuned = search(spec)
    first, second = sorted((of(tuned, twin), of(tuned, NEIGHBOUR)), key=lambda trial: trial.copy_of)
    assert second.copy_of == first.schedule.slug
    assert second.samples == first.samples
    assert sum(line in (f"screen {twin}", f"screen {NEIGHBOUR}") for line in lines(log)) == 1


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_copy_is_as_wrong_as_what_was_measured_for_it(
    spec: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    """The same machine code under two names: what the final finds wrong wins under neither, also if Ctrl-C ends it."""
    twins = beside(rows=16), NEIGHBOUR
    simulated.script(
        spec.parent / "script.json", same=dict.fromkeys(twins, "code"), ms=dict.fromkeys(twins, 0.5),
        wrong_held_out=twins,
    )  # fmt: skip
    inner = simulated.measure

    def measure(task: Task) -> Measurement:
        if interrupted and task.step is Step.TIME:
            raise KeyboardInterrupt
        return inner(task)

    monkeypatch.setattr(simulated, "measure", measure)
    tuned = search(spec)
    assert tuned.outcome.interrupted == interrupted
    assert all(of(tuned, slug).failure for slug in twins)
    failed = {record.schedule.slug: record.failure for record in tuned.records if record.failure}
    assert failed.keys() == set(twins)
    (won,) = [record.schedule.slug for record in tuned.records if not record.failure]
    assert won not in twins
    monkeypatch.setattr(simulated, "measure", inner)
    again = search(spec, trials=25)  # which hears of them from the journal
    assert all(of(again, slug).failure for slug in twins)


def test_known_failures_are_no_trials(spec: Path) -> None:
    """A limit of trials is one of candidates that are tried: the database's failures take none of it."""
    broken = [beside(rows=16), NEIGHBOUR]
    log = simulated.script(spec.parent / "script.json", unlaunchable=broken)
    search(spec)
    assert {record.schedule.slug for record in Database(spec.parent / "db").records() if record.failure} >= set(broken)
    for path in (spec.parent / "cache" / "tune").iterdir():
        path.unlink()  # so that only the database knows
    before = len(lines(log))
    again = search(spec, trials=2)
    assert len({line for line in lines(log)[before:] if line.startswith("screen")}) == 2
    assert again.outcome.choice is not None
    (won,) = [record for record in again.records if not record.failure]
    assert won.provenance.trials == 2


def test_a_killed_search_goes_on_without_repeating_a_trial(spec: Path) -> None:
    """More trials of the same search begin with those of the ledger."""
    log = simulated.script(spec.parent / "script.json")
    first = search(spec, trials=10)
    second = search(spec, trials=25)
    counts = Counter(line for line in lines(log) if line.startswith("screen"))
    assert set(counts.values()) == {1}
    assert len(counts) == 25
    assert {t.schedule for t in first.outcome.trials} < {t.schedule for t in second.outcome.trials}


def test_fresh_begins_anew(spec: Path) -> None:
    """The journal of earlier runs is dropped when asked."""
    log = simulated.script(spec.parent / "script.json")
    request = TuneRequest(Database(spec.parent / "db"), seconds=60, trials=5, fresh=True)
    for _ in range(2):
        list(tune(plan(str(spec)), request, simulated.context(), Silent()))
    assert set(Counter(line for line in lines(log) if line.startswith("screen")).values()) == {2}


def test_an_interrupt_keeps_the_best_so_far(spec: Path) -> None:
    """Ctrl-C in the middle of the screening: what was verified is chosen from, recorded and said to be partial."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job does not have

    class Impatient(Silent):
        def trial(self, trial: Trial, progress: SearchProgress) -> None:
            super().trial(trial, progress)
            if len(self.trials) >= 12:  # once more where a finaliser, of which Python ignores errors, had swallowed it
                os.kill(os.getpid(), signal.SIGINT)

    simulated.script(spec.parent / "script.json")
    try:
        tuned = search(spec, watcher=Impatient())
    finally:
        signal.signal(signal.SIGINT, before)
    assert tuned.outcome.interrupted
    assert tuned.outcome.choice is not None
    assert [r.schedule for r in Database(spec.parent / "db").records()] == [tuned.outcome.choice.winner]
    assert 12 <= len(tuned.outcome.trials) < 24


def test_the_budget_ends_a_search(spec: Path) -> None:
    """Out of time, the final is held with what there is, and in no more rounds than it must have."""
    log = simulated.script(spec.parent / "script.json", takes=1.0)
    tuned = search(spec, trials=None, seconds=100.0)
    assert tuned.outcome.choice is not None
    steps = Counter(line.split()[0] for line in lines(log))
    assert steps["screen"] == len(tuned.outcome.trials) == pytest.approx(Limits(100.0).screening, abs=3)
    assert (steps["held_out"], steps["time"]) == (FINALISTS + 1, (FINALISTS + 1) * FEWEST_ROUNDS)
    assert tuned.outcome.seconds == pytest.approx(steps["screen"] + steps["held_out"] + steps["time"], abs=3)


def test_a_machine_of_any_speed_searches_the_same(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets pass by the context's clock, here as tasks say: not by the host's, an hour later at each look."""
    simulated.script(spec.parent / "script.json")
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", partial(next, count(step=3600.0)))
        tuned = search(spec, trials=15)
    assert len(tuned.outcome.trials) == 15
    assert tuned.outcome.seconds < 10


def test_two_tuners_exclude_each_other(spec: Path) -> None:
    """The second says which process has the GPU, and does nothing."""
    log = simulated.script(spec.parent / "script.json")
    context = simulated.context()
    with (
        lock.exclusive(context.gpu),
        pytest.raises(TuneError, match=f"at a time .* process {os.getpid()} does"),
    ):
        search(spec, context)
    assert lines(log) == []
    search(spec, context, trials=2)


def test_a_read_only_database_loses_nothing(spec: Path) -> None:
    """One that turns read-only during the search: the ledger keeps the trials, so that the next run only writes."""

    class Blocking(Silent):
        def stage(self, text: str) -> None:
            if text.startswith("final"):
                (spec.parent / "db").write_text("in the way", encoding="utf-8")

    log = simulated.script(spec.parent / "script.json")
    with pytest.raises(DatabaseError, match="db must be"):
        search(spec, watcher=Blocking(), trials=5)
    (spec.parent / "db").unlink()
    search(spec, trials=5)
    assert set(Counter(line for line in lines(log) if line.startswith("screen")).values()) <= {1}
    assert len(Database(spec.parent / "db").records()) == 1


def test_a_database_that_cannot_be_written_is_said_at_once(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes before anything runs."""
    log = simulated.script(spec.parent / "script.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DatabaseError, match="db must be a folder that can be written"):
        search(spec, trials=5)
    assert lines(log) == []


def test_a_full_disk_ends_the_search_and_keeps_its_trials(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal refuses a line it cannot finish; what was there before is whole, and the search goes on later."""
    log = simulated.script(spec.parent / "script.json")
    writes = 0

    def fsync(handle: int) -> None:
        nonlocal writes
        writes += 1
        if writes == 25:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(TuneError, match="must be writable: No space left on device; trials so far are kept"):
        search(spec)
    before = len(lines(log))
    tuned = search(spec, trials=10)
    kept = sum(line.startswith("screen") for line in lines(log)[:before])
    assert kept >= 3
    assert len(tuned.outcome.trials) == 10
    counts = Counter(line for line in lines(log) if line.startswith("screen"))
    assert sum(counts.values()) - len(counts) <= 1, "only the trial whose line was refused runs again"


@pytest.mark.parametrize("where", ["compile", "run"])
def test_a_worker_that_cannot_write_ends_the_search(spec: Path, where: str) -> None:
    """A full disk is no candidate's failure: none is recorded, and the next search goes on where this one ended."""
    slug = NEIGHBOUR if where == "run" else beside(rows=16)
    log = simulated.script(spec.parent / "script.json", full=[slug])
    with pytest.raises(TuneError, match="must be able to write their files: No space left on device"):
        search(spec, simulated.context(inline=where == "compile"), trials=24)
    assert Database(spec.parent / "db").records() == ()
    before = lines(log)
    simulated.script(spec.parent / "again.json")
    tuned = search(spec, trials=24)
    assert [trial.failure for trial in tuned.outcome.trials] == [None] * 24
    again = [line.split()[1] for line in lines(spec.parent / "again.log") if line.startswith("screen")]
    done = [line.split()[1] for line in before if line.startswith("screen")]
    assert len(set(done) & set(again)) <= 1, "at most what was running then"


def test_inference_tunes_the_forward_alone(spec: Path) -> None:
    """The backward and the interval stay those of the family's default; no backward is timed."""
    simulated.script(spec.parent / "script.json")
    request = TuneRequest(Database(spec.parent / "db"), seconds=60, trials=20, objective=Objective.INFER)
    (tuned,) = tune(plan(str(spec)), request, simulated.context(), Silent())
    base = standard(tuned)
    assert {t.schedule.interval for t in tuned.outcome.trials} == {base.interval}
    for schedule in (t.schedule for t in tuned.outcome.trials):
        usual = type(schedule).default(tuned.goal.subject.variant, tuned.goal.subject.device)
        assert schedule.backward == usual.backward
    (record,) = tuned.records
    assert record.key.objective is Objective.INFER
    assert record.timing is not None
    assert record.timing.backward_ms is None


def test_progress_tells_what_is_left(spec: Path) -> None:
    """Progress counts trials, names the best and the failures by kind, and the time that is left falls."""
    simulated.script(spec.parent / "script.json", wrong=[NEIGHBOUR])
    watcher = Silent()
    search(spec, watcher=watcher)
    last = watcher.seen[-1]
    assert last.done == 24 == last.most
    assert last.failures == {"wrong": 1}
    assert last.best is not None
    assert last.default_ms == pytest.approx(3.75, rel=0.01)
    left = [progress.seconds_left for progress in watcher.seen]
    assert left == sorted(left, reverse=True)


def test_random_and_tpe_search_the_same_space(spec: Path) -> None:
    """Both begin with the default; the seed decides the rest of a random search."""
    simulated.script(spec.parent / "script.json")

    def order(sampler: Sampler, seed: int, run: int = 0) -> list[Schedule]:
        database = spec.parent / f"{sampler}{seed}{run}"
        request = TuneRequest(Database(database), seconds=60, trials=25, seed=seed, sampler=sampler, fresh=True)
        context = simulated.context(compilers=1)
        (tuned,) = tune(plan(str(spec)), request, context, Silent())
        return [trial.schedule for trial in tuned.outcome.trials]

    one, same, other = (order(Sampler.RANDOM, seed, run) for seed, run in ((1, 0), (1, 1), (2, 0)))
    assert one == same
    assert one != other
    assert order(Sampler.TPE, 1)[0] == one[0]


def test_records_seed_the_next_search(spec: Path) -> None:
    """Schedules of records are tried right after the default."""
    simulated.script(spec.parent / "script.json", ms={BEST: 1.0})
    request = TuneRequest(Database(spec.parent / "db"), seconds=60, trials=60)
    (first,) = tune(plan(str(spec)), request, simulated.context(), Silent())
    assert first.outcome.choice is not None
    elsewhere = replace(simulated.DEVICE, name="Another GPU", sm_count=100)
    (second,) = tune(plan(str(spec)), request, simulated.context(elsewhere, compilers=1), Silent())
    assert second.outcome.trials[1].schedule == first.outcome.choice.winner
    assert second.outcome.trials[1].origin == "similar"
    assert parse(first.outcome.choice.winner.slug) == first.outcome.choice.winner
