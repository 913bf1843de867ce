"""Time a plan's packages side by side with other implementations, on the GPU at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from m2gen.bench.against import Baseline, Comparison, compare
from m2gen.bench.entries import BenchContext, BenchWorkload, Implementation, serving_workloads
from m2gen.bench.kinds import Axis, Call, Kind
from m2gen.bench.peers import peers
from m2gen.bench.side_by_side import Result, side_by_side
from m2gen.bench.sweep import ROWS, SweepPoint, points
from m2gen.bench.worker import GPU
from m2gen.bucket import bucket_of
from m2gen.db import Record
from m2gen.db.choice import Choice, choose
from m2gen.errors import UsageError
from m2gen.measure import lock
from m2gen.measure.context import this_context
from m2gen.measure.workers import Worker
from m2gen.pipeline.packages import Packages
from m2gen.pipeline.plan import Plan, Progress, relevant
from m2gen.schedule import Family, default
from m2gen.variant import BuiltVariant


@dataclass(frozen=True)
class BenchRequest:
    """The layers, implementations and sizes to time."""

    layers: tuple[str, ...] = ()
    """Names of layers; if empty, all that have workloads."""
    kinds: tuple[Kind, ...] = tuple(Kind)
    peers: tuple[str, ...] = ()
    """Adapters as ``module:function``, in addition to those that installed packages register."""
    timing_only: bool = False
    """Whether peers are timed although their results fail the check."""
    decode: tuple[int, ...] = ()
    """Numbers of requests for which the calls of an engine are timed (``serving_workloads``)."""
    seed: int = 0
    """Seed of the order of rounds and of resampling."""


@dataclass(frozen=True)
class Swept:
    """The results at each point of one layer's sweep."""

    axis: Axis
    layer: str
    at: tuple[tuple[SweepPoint, tuple[Result, ...]], ...]


@contextmanager
def this_bench_context(command: str) -> Iterator[BenchContext]:
    """Lock the GPU at hand and start a worker process; raises UsageError if there is no GPU."""
    here = this_context(command)
    timer = Worker(GPU)
    try:
        with lock.exclusive(here.gpu):
            yield BenchContext(here.device, here.environment, here.gpu, here.worker, timer)
    finally:
        timer.stop()


@dataclass(frozen=True)
class _Implementations:
    """The implementations to time: packages by their plans, PyTorch loops, and peers."""

    packages: dict[Kind, Packages]
    context: BenchContext
    request: BenchRequest

    def of(self, workload: BenchWorkload) -> list[Implementation]:
        """Return the implementations for a workload; beside the default, other packages only if their schedule differs.

        By itself, what tuning gives is timed whatever it is.
        """
        variant, kinds = workload.variant, self.request.kinds
        base, *others = (self._generated(kind, workload) for kind in self.packages)
        loops = [Implementation(kind, default(variant, self.context.device)) for kind in (Kind.EAGER, Kind.COMPILED)]
        alone = Kind.DEFAULT not in kinds
        found = [base, *(each for each in others if _adds(each, base) or (alone and each.kind is Kind.TUNED))]
        found += [] if workload.packed or workload.call.pooled else loops  # which have no offsets, and no slots
        if workload.call is Call.SEQUENCE:
            named = peers(self.request.peers).items()
            peer = Implementation(Kind.PEER, base.schedule, timing_only=self.request.timing_only)
            found += [replace(peer, source=adapter, label=name) for name, adapter in named]
        return [implementation for implementation in found if implementation.kind in kinds]

    def _generated(self, kind: Kind, workload: BenchWorkload) -> Implementation:
        device = self.context.device
        bucket = bucket_of(workload.batch, workload.variant.total_heads, device.sm_count)
        choice, folder = self.packages[kind].serving(workload.variant, device.arch, bucket)
        return Implementation(kind, choice.schedule, choice.source, folder)

    def results(
        self, jobs: Sequence[tuple[str, BenchWorkload]], progress: Progress, stage: str = "bench", arms: int = 1
    ) -> Iterator[tuple[Result, ...]]:
        """Yield the results of each (name, workload) as they are known; raises UsageError if there is none to time."""
        progress.start(stage, len(jobs))
        try:
            timed = [self.of(workload) for _, workload in jobs]
            if not any(timed):
                raise UsageError(f"--only must have something to time, got {_nothing(self.request.kinds)}")
            for (name, workload), found in zip(jobs, timed, strict=True):
                yield tuple(side_by_side(workload, found, self.context, seed=self.request.seed, arms=arms))
                progress.advance(name)
        finally:
            progress.finish()


def _nothing(kinds: Sequence[Kind]) -> str:
    """Say why there is nothing of these kinds."""
    reasons = {
        Kind.PORTABLE: "the default schedules are portable ones",
        Kind.EAGER: "loops have no packed workloads",
        Kind.COMPILED: "loops have no packed workloads",
        Kind.PEER: "there is no peer",
    }
    whys = dict.fromkeys(reasons[kind] for kind in kinds if kind in reasons)
    return f"{', '.join(kinds)} ({'; '.join(whys)})"


def _adds(other: Implementation, base: Implementation) -> bool:
    """Whether a package is worth timing beside that of defaults: portable kernels only where those have others."""
    if other.kind is Kind.PORTABLE:
        return base.schedule.family is not Family.PORTABLE
    return other.schedule != base.schedule


def _implementations(planned: Plan, context: BenchContext, request: BenchRequest) -> _Implementations:
    plans = {Kind.DEFAULT: planned.without_records(), Kind.PORTABLE: planned.portable(), Kind.TUNED: planned}
    asked = {kind: Packages(plan) for kind, plan in plans.items() if kind in (Kind.DEFAULT, *request.kinds)}
    return _Implementations(asked, context, request)


def workloads(planned: Plan, request: BenchRequest) -> list[BenchWorkload]:
    """Return all variants on their layers' workloads, then serving.

    Raises UsageError for a layer that is unknown or was asked for without workloads, and if none has any.
    """
    layers = planned.layers(request.layers)
    if bare := [name for name in request.layers if not layers[name].workloads]:
        raise UsageError(f"{', '.join(dict.fromkeys(bare))} must have workloads to be timed, got none")
    named = [
        (name, built.variant)
        for built in planned.variants
        for name in built.layers
        if name in layers and layers[name].workloads
    ]
    sequences = [
        BenchWorkload(name, variant, w.batch, w.seq, packed=w.packed)
        for name, variant in named
        for w in layers[name].workloads
    ]
    serving = [
        workload
        for name, variant in named
        for batch in request.decode
        for workload in serving_workloads(name, variant, batch)
    ]
    if not sequences:
        raise UsageError("the spec must have workloads to be timed, got none")
    return sequences + serving


def bench(
    planned: Plan, request: BenchRequest, context: BenchContext, progress: Progress
) -> Iterator[tuple[Result, ...]]:
    """Yield the results of each workload as they are known."""
    jobs = [(workload.name, workload) for workload in workloads(planned, request)]
    yield from _implementations(planned, context, request).results(jobs, progress)


def sweep(
    planned: Plan,
    axis: Axis,
    request: BenchRequest,
    context: BenchContext,
    records: Sequence[Record],
    progress: Progress,
) -> Iterator[Swept]:
    """Time generated kernels and peers along an axis, from the first workload of the first layer in question.

    Yields the results so far after each point, so that an interruption loses none.
    """
    base = replace(workloads(planned, request)[0], packed=False)  # a point's sequences have one length
    widest = replace(base.variant, state_expansion=ROWS[-1])
    every = points(axis, base, context.device.sm_count, default(widest, context.device).forward.rows)
    built = [BuiltVariant(variant, (base.layer,)) for variant in dict.fromkeys(p.workload.variant for p in every)]
    grown = replace(planned, choices=_choices(planned, built, relevant(records, built)))
    kinds = tuple(kind for kind in request.kinds if kind.most_steps is None)
    if not kinds:
        raise UsageError(f"--only must have kernels or peers for --sweep, got {', '.join(request.kinds)}")
    timed = _implementations(grown, context, replace(request, kinds=kinds))
    jobs = [(f"{axis} {point.x}", point.workload) for point in every]
    found = Swept(axis, base.layer, ())
    for point, results in zip(every, timed.results(jobs, progress, f"sweep {axis}"), strict=True):
        found = replace(found, at=(*found.at, (point, results)))
        yield found


def _choices(planned: Plan, built: Sequence[BuiltVariant], records: Sequence[Record]) -> tuple[Choice, ...]:
    devices = dict.fromkeys(choice.device for choice in planned.choices)
    objective = planned.spec.tuning.objective
    return tuple(c for device in devices for each in built for c in choose(each, device, objective, records))


def regressions(
    planned: Plan, request: BenchRequest, context: BenchContext, before: Baseline, progress: Progress
) -> Iterator[Comparison]:
    """Yield the comparison of every recorded time with one of now, each binary timed twice.

    Raises UsageError if no workload of the plan has a recorded time of what is asked for.
    """
    kinds = tuple(kind for kind in (Kind.DEFAULT, Kind.TUNED) if kind in request.kinds)
    if not kinds:
        raise UsageError(f"--only must have default or tuned for --against, got {', '.join(request.kinds)}")
    jobs = [(workload.name, workload) for workload in workloads(planned, request) if before.has(workload, kinds)]
    if not jobs:
        raise UsageError(f"--against must have times of {' or '.join(kinds)} on the spec's workloads, got none")
    timed = _implementations(planned, context, replace(request, kinds=kinds))
    for results in timed.results(jobs, progress, arms=2):
        yield from compare(results, before, kinds, request.seed)
