"""Run packages against the float64 reference, on the GPU or in the interpreter, in processes of their own."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from m2gen.cache import materialise
from m2gen.device import PORTABLE, TARGETS, Device, detect
from m2gen.errors import UsageError, among
from m2gen.kernels.compile import load_module
from m2gen.measure.workers import Lost, Service, cpus, run_isolated, without_interpreter
from m2gen.pipeline.plan import Plan, Progress, plan, render
from m2gen.schedule import parse
from m2gen.variant import BuiltVariant, Variant

if TYPE_CHECKING:  # importing these imports torch, and the processes must set their environment first
    from m2gen.verify import Case, CaseReport, TensorResult

MATRIX = ("matrix.yaml", "matrix_total.yaml")
"""The shipped specs whose packages ``--full`` runs."""
GPU_PROCESSES = 12
"""At most: each has its own context on the GPU, and most of the time goes into compiling."""
GPU_SECONDS = 300.0
INTERPRETER_SECONDS = 900.0


@dataclass(frozen=True)
class VerifyRequest:
    """What to verify of a plan: everything that applies, or one variant or case, with a seed."""

    variant: str | None = None
    case: str | None = None
    seed: int = 0
    quick: bool = False
    """The first case of every variant, and one of every feature."""


@dataclass(frozen=True)
class VerifyOutcome:
    """Every case's report, where the kernels ran, and how long it took by the clock."""

    backend: str
    reports: tuple[CaseReport, ...]
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return all(report.passed for report in self.reports)


@dataclass(frozen=True)
class _Job:
    """One case for one process."""

    folder: Path
    spec: str
    variant: Variant
    case: Case
    seed: int
    interpreted: bool
    schedule: str
    name: str


def verify(planned: Plan, request: VerifyRequest, progress: Progress) -> VerifyOutcome:
    """Run the package that the plan renders against the float64 reference: on the GPU, else in the interpreter."""
    device = detect()
    return _run(_selected(_jobs(planned, request, device), request), device, progress)


def verify_full(request: VerifyRequest, progress: Progress) -> VerifyOutcome:
    """Run the whole matrix of the shipped specs on the GPU; raises UsageError where there is none.

    A layer named after a feature (``dims``, ``heads_84``) has only that feature's cases, the others have all.
    """
    device = detect()
    if device is None:
        raise UsageError("m2gen verify --full must run on a machine whose GPU torch can use, got none")
    arches = [device.arch] if device.arch in TARGETS else []
    jobs = [job for spec in MATRIX for job in _jobs(plan(spec, arches), request, device, matrix=True)]
    return _run(_selected(jobs, request), device, progress)


def _jobs(planned: Plan, request: VerifyRequest, device: Device | None, *, matrix: bool = False) -> list[_Job]:
    """Return a job for every case that the request's extent has, whatever variant or case it names.

    Cases are small, and reach one bucket only: every schedule is run in a package of its own, where it serves all.
    """
    arch = device.arch if device else PORTABLE.arch
    names = planned.names
    seen: set[tuple[str, str]] = set()
    jobs: list[_Job] = []
    for part in planned.uniform():
        slugs = {built.variant: part.serving(built.variant, arch)[0].schedule.slug for built in part.variants}
        new = [b for b in part.variants if (b.variant.key, slugs[b.variant]) not in seen]
        seen |= {(variant.key, slug) for variant, slug in slugs.items()}
        if not new:
            continue
        folder = materialise(f"packages/{planned.origin.name}", render(part).files)
        for variant, case in _chosen(part, new, request, device, matrix=matrix):
            facts = (planned.origin.spec_file, variant, case, request.seed, device is None, slugs[variant])
            jobs.append(_Job(folder, *facts, names[variant]))
    return jobs


def _chosen(
    planned: Plan, built: list[BuiltVariant], request: VerifyRequest, device: Device | None, *, matrix: bool
) -> list[tuple[Variant, Case]]:
    """Return the cases of variants, each of which has one schedule in this plan."""
    from m2gen.verify import cases, quick

    interpreted, arch = device is None, device.arch if device else PORTABLE.arch
    intervals = {b.variant: planned.interval(b.variant, arch) for b in built}
    if request.quick:
        return list(quick(intervals, interpreted=interpreted))
    found = {variant: cases(variant, c, interpreted=interpreted) for variant, c in intervals.items()}
    extent = {b.variant: _named_features(b, found[b.variant]) for b in built} if matrix else found
    return [(variant, case) for variant, every in extent.items() for case in every]


def _named_features(built: BuiltVariant, found: tuple[Case, ...]) -> tuple[Case, ...]:
    """Return the cases of the features that a variant's layers are named after; all if a layer has another name."""
    from m2gen.verify import Feature, only

    named = [{f for f in Feature if name == f or name.startswith(f"{f}_")} for name in built.layers]
    return only(set().union(*named), found) if all(named) else found


def _selected(jobs: list[_Job], request: VerifyRequest) -> list[_Job]:
    """Keep the variant and the case that the request names; raises UsageError where there is no such one."""
    variants = dict.fromkeys(job.variant.key for job in jobs)
    if request.variant is not None and request.variant not in variants:
        raise UsageError(f"--variant must be {among(variants)}, got {request.variant!r}")
    jobs = [job for job in jobs if request.variant in (None, job.variant.key)]
    names = dict.fromkeys(job.case.name for job in jobs)
    if request.case is not None and request.case not in names:
        raise UsageError(f"--case must be {among(names)}, got {request.case!r}")
    return [job for job in jobs if request.case in (None, job.case.name)]


def _run(jobs: list[_Job], device: Device | None, progress: Progress) -> VerifyOutcome:
    """Run jobs in processes; the reports keep the order of ``jobs``."""
    start = time.monotonic()
    interpreted = device is None
    seconds = INTERPRETER_SECONDS if interpreted else GPU_SECONDS
    service = Service(_verify_job, _interpret if interpreted else _use_gpu, seconds, _lost, _untrusted)
    processes = cpus() if interpreted else min(cpus(), GPU_PROCESSES)
    reports: dict[_Job, CaseReport] = {}
    progress.start("verify", len(jobs))
    for job, report in run_isolated(_groups(jobs, alone=interpreted), service, processes):
        reports[job] = report
        progress.advance(f"{report.name} {report.feature} {report.case}")
    progress.finish()
    name = device.name if device else "interpreter"
    return VerifyOutcome(name, tuple(reports[job] for job in jobs), time.monotonic() - start)


def _groups(jobs: Iterable[_Job], *, alone: bool) -> list[list[_Job]]:
    """Return jobs that share compiled kernels together, the groups that take longest first."""
    groups: dict[object, list[_Job]] = {}
    for job in jobs:
        groups.setdefault(job if alone else (job.folder, job.variant, job.case.feature), []).append(job)
    return sorted(groups.values(), key=lambda group: -sum(map(_cost, group)))


def _cost(job: _Job) -> float:
    """Guess how long a job takes, in units of a small case: what it compiles, steps of the reference, tiles."""
    from m2gen.verify import Check

    tiles = job.variant.padded_rows * job.variant.padded_cols / 4096
    steps = max(job.case.problem.seq, sum(job.case.problem.lengths or ()))
    if job.interpreted:
        tiles *= job.variant.total_heads * steps
    compiles = {Check.COMPILE: 20.0, Check.OPCHECK: 10.0, Check.SINGLE: 10.0, Check.GRAPH: 5.0}
    return compiles.get(job.case.check, 1.0) + tiles + steps / 200


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)  # of exp2, on the way to a tanh of 1
    import torch

    torch.set_num_threads(1)


def _use_gpu() -> None:
    without_interpreter()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # these processes are as many as there are cores


def _verify_job(job: _Job) -> CaseReport:
    """Run one case; a package that cannot be imported is a failed case, too."""
    import torch

    from m2gen.verify import failed_case, run_case

    device = torch.device("cpu" if job.interpreted else "cuda")
    try:
        module = load_module(job.folder / "__init__.py", f"m2gen_package_{job.folder.name}")
    except Exception as error:  # of whatever a generated module does when it is imported
        return _of(job, failed_case(job.variant, job.case, job.seed, error))
    report = run_case(module, job.variant, job.case, job.seed, device)
    if not job.interpreted:
        torch.cuda.empty_cache()  # a dozen processes share the GPU's memory
    return _of(job, report)


def _of(job: _Job, report: CaseReport) -> CaseReport:
    """Return the report with what only the job knows: where the kernels come from, and what they are called."""
    return replace(report, spec=job.spec, schedule=job.schedule, name=job.name)


def _lost(job: _Job, lost: Lost) -> CaseReport:
    from m2gen.verify import report

    return _of(job, report(job.variant, job.case, job.seed, failure=lost.reason))


def _untrusted(report: CaseReport) -> bool:
    """Whether a process may be unusable: an error on a GPU stays with its context."""
    return bool(report.failure)


def failed(reports: Sequence[CaseReport]) -> list[tuple[CaseReport, TensorResult | None]]:
    """Return (report, tensor result) of everything over budget, and (report, None) of every case that broke off."""
    found: list[tuple[CaseReport, TensorResult | None]] = []
    for report in reports:
        found += [(report, None)] if report.failure else []
        found += [(report, result) for result in report.results if not result.passed]
    return found


def reproduce(report: CaseReport) -> str:
    """Return the command that runs one case again."""
    return f"m2gen verify --spec {report.spec} --variant {report.variant} --case {report.case} --seed {report.seed}"


def failure_lines(outcome: VerifyOutcome) -> list[str]:
    """Say, a line each, what is over budget or broke off and how to see it again."""
    lines = []
    for report, result in failed(outcome.reports):
        what = report.failure if result is None else f"{result.tensor} {result.verdict}"
        kernels = f" ({parse(report.schedule).describe()})" if report.schedule else ""
        lines.append(f"{report.name or report.variant} {report.case}{kernels}: {what}; reproduce: {reproduce(report)}")
    return lines
