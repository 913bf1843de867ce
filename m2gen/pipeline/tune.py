"""Search schedules for a plan's workloads on the GPU at hand, and add the results to the tuning database."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from m2gen.cache import cache_dir, key_of
from m2gen.db import Change, Environment, Record
from m2gen.device import Device, detect, target
from m2gen.errors import DatabaseError
from m2gen.kernels.compile import toolchain
from m2gen.kernels.render import template_hash
from m2gen.measure import lock
from m2gen.measure.context import environment, this_context
from m2gen.measure.nvml import ClockWatch
from m2gen.measure.workers import cpus
from m2gen.pipeline.goals import Goal, TuneRequest, goals
from m2gen.pipeline.plan import Plan
from m2gen.schedule import AnySchedule, defaults
from m2gen.tune.gpu import GPU
from m2gen.tune.ledger import Ledger, open_ledger
from m2gen.tune.log import Limits, Outcome, TrialLog, Watcher
from m2gen.tune.loop import Search
from m2gen.tune.precompile import PRECOMPILE
from m2gen.tune.records import key_of_subject, known_failures, records_of, seeds
from m2gen.tune.sampler import Sampler
from m2gen.tune.search import Proposer, neighbours, tiles
from m2gen.tune.services import Processes, Services, TuningContext, processes_of
from m2gen.tune.space import enumerate_space, space_hash
from m2gen.tune.study import FORM
from m2gen.tune.subject import Space, Subject

GPU_SECONDS_EACH = 1.0
"""Typical GPU time of a trial (docs/tuning.md)."""
COMPILE_SECONDS_EACH = 8.0
"""Typical time to compile a candidate on one CPU."""


@dataclass(frozen=True)
class Tuned:
    """The outcome of one search, and its records in the database."""

    goal: Goal
    outcome: Outcome
    records: tuple[Record, ...]
    change: Change


@dataclass(frozen=True)
class Size:
    """The size of one search's space, and the expected time to try all of it."""

    goal: Goal
    space: Space
    seconds: float
    """Expected time to try every point."""
    first: tuple[tuple[AnySchedule, str], ...]
    """The candidates that would be tried before any sampler proposes one, and their origins."""


def dry_run(planned: Plan, request: TuneRequest, device: Device, compilers: int) -> list[Size]:
    """Enumerate every search's space and its first candidates; nothing is compiled or run."""
    each = max(GPU_SECONDS_EACH, COMPILE_SECONDS_EACH / compilers)
    here, every = environment(device), request.database.records()
    found = []
    for goal in goals(planned, request, device):
        space = enumerate_space(goal.subject)
        known = {trial.schedule for trial in known_failures(goal.subject, here, every)}
        first = dict(reversed(first_candidates(goal.subject, here, every, space, request.sampler)))  # first origins win
        order = [(point, origin) for point, origin in reversed(first.items()) if point not in known]
        found.append(Size(goal, space, len(space.points) * each, tuple(order)))
    return found


def first_candidates(
    subject: Subject, environment: Environment, records: Sequence[Record], space: Space, sampler: Sampler | None
) -> list[tuple[AnySchedule, str]]:
    """Return what a search tries first, with each candidate's origin: seeds of the database, then the default's kin.

    A schedule that has several origins is there for each of them. Without TPE only seeds come first.
    """
    first = seeds(subject, environment, records)
    if sampler is Sampler.TPE:
        if subject.kernel is None:
            starts = defaults(subject.variant, subject.device, subject.bucket)
            first += [(point, "tile") for point in tiles(starts, space.points)]
        first += [(point, "neighbour") for point in neighbours(first[0][0], space.points)]
    return first


def dry_run_device(arch: str | None, targets: Sequence[str]) -> Device:
    """Return the device of a dry run: that of ``arch``, else the GPU at hand, else the spec's first target."""
    return target(arch) if arch else detect() or target(targets[0])


def this_tuning_context(command: str) -> TuningContext:
    """Return the GPU at hand with its services; raises UsageError if there is none."""
    here = this_context(command)
    services = Services(PRECOMPILE, GPU, max(1, cpus() - 2))
    return TuningContext(here.device, here.environment, here.gpu, here.worker, services)


def tune(planned: Plan, request: TuneRequest, context: TuningContext, watcher: Watcher) -> Iterator[Tuned]:
    """Run the searches one after the other within the budget, and yield each once its records are in the database."""
    chosen, names = goals(planned, request, context.device), planned.names
    _check_writable(request.database.root)
    budget = planned.spec.tuning.budget_seconds if request.seconds is None else request.seconds
    start = context.now()
    with lock.exclusive(context.gpu), processes_of(context.services) as processes:
        for index, goal in enumerate(chosen):
            left = (budget - (context.now() - start)) / (len(chosen) - index)
            kernel = f"{goal.subject.kernel.replace('_', ' ')} " if goal.subject.kernel else ""
            name = f"{names[goal.variant]} {kernel}{goal.subject.size}"
            watcher.stage(f"{name}, {index + 1} of {len(chosen)}")
            limits = Limits(max(left, 1.0), request.trials, context.now)
            tuned = _tune_one(goal, request, context, limits, (processes, watcher))
            yield tuned
            if tuned.outcome.interrupted:
                return


def _check_writable(root: Path) -> None:
    """Raise DatabaseError if records could not be added, before hours of searching."""
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise DatabaseError(f"{root} must be a folder that can be written, or that can be made")


def _tune_one(
    goal: Goal, request: TuneRequest, context: TuningContext, limits: Limits, others: tuple[Processes, Watcher]
) -> Tuned:
    processes, watcher = others
    subject, here = goal.subject, context.environment
    every = request.database.records()
    space = enumerate_space(subject)
    sampler = None if _exhaustive(space, limits, context) else request.sampler
    first = first_candidates(subject, here, every, space, sampler)
    proposer = Proposer(space.points, first, sampler, request.seed)
    with _ledger(subject, request, context) as ledger:
        log = TrialLog(subject, proposer.default, limits, ledger, watcher)
        search = Search(log, proposer, processes, context.worker)
        with ClockWatch(context.gpu) as watch:
            outcome = search.run(request.seed, known_failures(subject, here, every))
    outcome = replace(outcome, clocks=watch.clocks)
    found = records_of(outcome, context, request.seed, study_name(subject, context))
    return Tuned(goal, outcome, tuple(found), request.database.add(found))


def _exhaustive(space: Space, limits: Limits, context: TuningContext) -> bool:
    """Return whether there is time to try every point."""
    each = max(GPU_SECONDS_EACH, COMPILE_SECONDS_EACH / context.services.compilers)
    within = limits.trials is None or len(space.points) <= limits.trials
    return within and len(space.points) * each <= limits.screening


def study_name(subject: Subject, context: TuningContext) -> str:
    """Return a name for a search, made of everything that its trials depend on."""
    facts = (repr(key_of_subject(subject)), repr(asdict(context.environment)), f"{subject.batch} {subject.seq}")
    return key_of(*facts, template_hash(), space_hash(subject.kernel), toolchain(), FORM)


def _ledger(subject: Subject, request: TuneRequest, context: TuningContext) -> AbstractContextManager[Ledger]:
    """Return the ledger of trials: in the database that several workers share, or a journal in the user's cache."""
    search = header_of(subject, context)
    journal = cache_dir() / "tune" / f"{subject.tunable.key}-{str(search['study'])[:12]}.log"
    return closing(open_ledger(request.storage or journal, search, context.worker, fresh=request.fresh))


def header_of(subject: Subject, context: TuningContext) -> dict[str, object]:
    """Return what a ledger says of a search: its problem and GPU, which is all that learning asks, and its name."""
    problem = {"variant": subject.variant.key, "batch": subject.batch, "seq": subject.seq}
    kernel = {"kernel": subject.kernel} if subject.kernel else {}
    here = context.environment
    return {
        **problem,
        **kernel,
        "objective": subject.objective,
        "arch": here.arch,
        "device": here.device,
        "sm_count": here.sm_count,
        "study": study_name(subject, context),
    }
