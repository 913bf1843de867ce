"""Search schedules for a plan's workloads on the GPU at hand, and put what was found into the tuning database."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from m2gen.cache import cache_dir, key_of
from m2gen.db import Change, Database, Record
from m2gen.device import Device, detect, target
from m2gen.errors import DatabaseError, UsageError
from m2gen.kernels.compile import toolchain, workers
from m2gen.kernels.render import template_hash
from m2gen.measure import lock
from m2gen.pipeline.plan import Plan
from m2gen.spec import Objective
from m2gen.tune.book import Book, Crew, Ledger, Limits, Outcome, Stations, Watcher, crew_of
from m2gen.tune.gpu import GPU
from m2gen.tune.journal import Journal
from m2gen.tune.loop import Search
from m2gen.tune.memory import USUAL, MemoryBound
from m2gen.tune.precompile import PRECOMPILE
from m2gen.tune.records import Bench, key_of_subject, known_failures, records_of, seeds
from m2gen.tune.sampler import Sampler
from m2gen.tune.search import Proposer, neighbours, tiles
from m2gen.tune.space import Space, Subject, enumerate_space, space_hash

GPU_SECONDS_EACH = 1.0
"""What a trial takes of the GPU, about (docs/tuning.md)."""
COMPILE_SECONDS_EACH = 8.0
"""What a candidate takes of one CPU."""


@dataclass(frozen=True)
class TuneRequest:
    """What to tune of a plan, how long, and where results go."""

    database: Database
    layers: tuple[str, ...] = ()
    """Names of layers; all that have workloads where there are none."""
    seconds: float | None = None
    """For all searches together; the spec's budget where None."""
    trials: int | None = None
    """For each search."""
    seed: int = 0
    sampler: Sampler = Sampler.TPE
    objective: Objective | None = None
    memory: MemoryBound = USUAL
    storage: str | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Rig:
    """What measures: a device and the stations that serve it, real or simulated."""

    device: Device
    bench: Bench
    stations: Stations
    gpu: str
    """Names the GPU, which one tuner at a time may use."""


@dataclass(frozen=True)
class Goal:
    """One search: the subject, and the layer of the spec that asks for it first."""

    layer: str
    subject: Subject


@dataclass(frozen=True)
class Tuned:
    """What one search found and left in the database."""

    goal: Goal
    outcome: Outcome
    records: tuple[Record, ...]
    change: Change


def goals(planned: Plan, request: TuneRequest, device: Device) -> list[Goal]:
    """Return a search for every variant and bucket of the plan's workloads; of several in one bucket, the first.

    Raises UsageError for a layer that the spec does not have, and where no layer has a workload.
    """
    layers = planned.spec.layers
    for name in request.layers:
        if name not in layers:
            raise UsageError(f"--layer must be among {', '.join(layers)}, got {name!r}")
    found: dict[object, Goal] = {}
    for built in planned.variants:
        for name in built.layers:
            for workload in layers[name].workloads if not request.layers or name in request.layers else ():
                objective = request.objective or planned.spec.tuning.objective
                sizes = (workload.batch, workload.seq, request.memory)
                subject = Subject(built.variant, device, objective, *sizes)
                found.setdefault(key_of_subject(subject), Goal(name, subject))
    if not found:
        raise UsageError(f"{planned.origin.spec_file} must have a layer with workloads to tune for, got none")
    return list(found.values())


@dataclass(frozen=True)
class Size:
    """How large one search's space is, and how long it is expected to take."""

    goal: Goal
    space: Space
    seconds: float
    """Of trying every point."""


def dry_run(planned: Plan, request: TuneRequest, device: Device, compilers: int) -> list[Size]:
    """Enumerate every search's space; nothing is compiled or run."""
    each = max(GPU_SECONDS_EACH, COMPILE_SECONDS_EACH / compilers)
    spaces = [(goal, enumerate_space(goal.subject)) for goal in goals(planned, request, device)]
    return [Size(goal, space, len(space.points) * each) for goal, space in spaces]


def dry_run_device(arch: str | None, targets: Sequence[str]) -> Device:
    """Return the device whose space is sized: that of the arch, else the GPU at hand, else the spec's first target."""
    return target(arch) if arch else detect() or target(targets[0])


def this_rig(command: str, seed: int = 0) -> Rig:
    """Return the GPU at hand with its workers; raises UsageError where there is none."""
    from m2gen.measure.environment import environment, gpu_name, worker_name

    device = detect()
    if device is None:
        raise UsageError(f"{command} must run on a machine whose GPU torch can use, got none")
    compilers = max(1, workers() - 2)
    bench = Bench(environment(device), seed, worker_name(), "")
    return Rig(device, bench, Stations(PRECOMPILE, GPU, compilers, worker_name()), gpu_name())


def tune(planned: Plan, request: TuneRequest, rig: Rig, watcher: Watcher) -> Iterator[Tuned]:
    """Search for every goal, one after the other within the budget, and yield each once it is in the database."""
    chosen, names = goals(planned, request, rig.device), planned.names
    _check_writable(request.database.root)
    budget = planned.spec.tuning.budget_seconds if request.seconds is None else request.seconds
    start = time.monotonic()
    with lock.exclusive(rig.gpu), crew_of(rig.stations) as crew:
        for index, goal in enumerate(chosen):
            left = (budget - (time.monotonic() - start)) / (len(chosen) - index)
            name = f"{names[goal.subject.variant]} B{goal.subject.batch} S{goal.subject.seq}"
            watcher.stage(f"{name}, {index + 1} of {len(chosen)}")
            limits = Limits(max(left, 1.0), request.trials)
            tuned = _tune_one(goal, request, rig, limits, (crew, watcher))
            yield tuned
            if tuned.outcome.interrupted:
                return


def _check_writable(root: Path) -> None:
    """Raise DatabaseError where records could not be added after hours of searching."""
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise DatabaseError(f"{root} must be a folder that can be written, or that can be made")


def _tune_one(goal: Goal, request: TuneRequest, rig: Rig, limits: Limits, others: tuple[Crew, Watcher]) -> Tuned:
    crew, watcher = others
    subject, environment = goal.subject, rig.bench.environment
    every = request.database.records()
    space = enumerate_space(subject)
    sampler = None if _exhaustive(space, limits, rig) else request.sampler
    first = seeds(subject, environment, every)
    if sampler is Sampler.TPE:
        first += [(point, "tile") for point in tiles(first[0][0], space.points)]
        first += [(point, "neighbour") for point in neighbours(first[0][0], space.points)]
    proposer = Proposer(space.points, first, sampler, request.seed)
    with _ledger(subject, request, rig) as ledger:
        book = Book(subject, proposer.default, limits, ledger, watcher)
        outcome = Search(book, proposer, crew, rig.stations.worker).run(
            request.seed, known_failures(subject, environment, every)
        )
    found = records_of(outcome, replace(rig.bench, study=study_name(subject, rig)))
    return Tuned(goal, outcome, tuple(found), request.database.add(found))


def _exhaustive(space: Space, limits: Limits, rig: Rig) -> bool:
    """Whether every point can be tried."""
    each = max(GPU_SECONDS_EACH, COMPILE_SECONDS_EACH / rig.stations.compilers)
    within = limits.trials is None or len(space.points) <= limits.trials
    return within and len(space.points) * each <= limits.screening


def study_name(subject: Subject, rig: Rig) -> str:
    """Name a search by everything that its trials depend on."""
    facts = (repr(key_of_subject(subject)), repr(asdict(rig.bench.environment)), f"{subject.batch} {subject.seq}")
    return key_of(*facts, template_hash(), space_hash(), toolchain())


def _ledger(subject: Subject, request: TuneRequest, rig: Rig) -> AbstractContextManager[Ledger]:
    """Return where trials are kept: a study that several workers share, or a journal in the user's cache."""
    name = study_name(subject, rig)
    if request.storage is not None:
        from m2gen.tune.shared import open_study

        return closing(open_study(request.storage, name, rig.stations.worker, fresh=request.fresh))
    path = cache_dir() / "tune" / f"{subject.variant.key}-{name[:12]}.jsonl"
    if request.fresh:
        path.unlink(missing_ok=True)
    header = {"variant": subject.variant.key, "batch": subject.batch, "seq": subject.seq, "study": name}
    return closing(Journal(path, header))
