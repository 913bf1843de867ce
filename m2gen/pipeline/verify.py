"""Verify packages against the float64 reference: which cases to run, and what they found."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m2gen.cache import materialise
from m2gen.device import PORTABLE, TARGETS, Device, detect
from m2gen.errors import UsageError, among
from m2gen.pipeline.plan import Plan, Progress, plan, render
from m2gen.pipeline.verify_jobs import VerifyJob, run_jobs
from m2gen.schedule import parse
from m2gen.variant import BuiltVariant, Variant

if TYPE_CHECKING:  # importing these imports torch, and worker processes must set their environment first
    from m2gen.verify import Case, CaseReport, TensorResult

MATRIX = ("matrix.yaml", "matrix_total.yaml")
"""Shipped specs whose packages ``--full`` verifies."""


@dataclass(frozen=True)
class VerifyRequest:
    """The part of a plan to verify: all cases that apply, or those of a variant, of features or of one name."""

    variant: str | None = None
    case: str | None = None
    features: tuple[str, ...] = ()
    """Names of the features whose cases are wanted; none for those of all."""
    seed: int = 0
    quick: bool = False
    """Run only the first case of every variant and of every feature."""
    options: str = ""
    """The options that give the plan, quoted for a shell, as ``--spec exp/a.yaml --no-db``; if empty, its spec's."""


@dataclass(frozen=True)
class VerifyOutcome:
    """The reports of all cases, the backend of the kernels, and the elapsed seconds."""

    backend: str
    reports: tuple[CaseReport, ...]
    seconds: float = 0.0
    options: str = ""
    """The request's, by which a case is reproduced."""

    @property
    def passed(self) -> bool:
        return all(report.passed for report in self.reports)


def verify(planned: Plan, request: VerifyRequest, progress: Progress) -> VerifyOutcome:
    """Verify the package that the plan renders against float64: on the GPU, or in the interpreter if there is none."""
    device = detect()
    return _outcome(_selected(_jobs(planned, request, device), request), device, request.options, progress)


def verify_full(request: VerifyRequest, progress: Progress) -> VerifyOutcome:
    """Verify the whole matrix of the shipped specs on the GPU; raises UsageError if there is none.

    A layer named after a feature (``dims``, ``heads_84``) has only that feature's cases, other layers have all.
    """
    device = detect()
    if device is None:
        raise UsageError("m2gen verify --full must run on a machine whose GPU torch can use, got none")
    arches = [device.arch] if device.arch in TARGETS else []
    jobs = [job for spec in MATRIX for job in _jobs(plan(spec, arches), request, device, matrix=True)]
    return _outcome(_selected(jobs, request), device, request.options, progress)


def _jobs(planned: Plan, request: VerifyRequest, device: Device | None, *, matrix: bool = False) -> list[VerifyJob]:
    """Return a job for every case, before the request's variant and case are selected.

    Cases are small, and reach one bucket only, so every schedule runs in a package in which it serves all buckets.
    """
    arch = device.arch if device else PORTABLE.arch
    names = planned.names
    seen: set[tuple[str, str]] = set()
    jobs: list[VerifyJob] = []
    for part in planned.uniform():
        slugs = {built.variant: part.serving(built.variant, arch)[0].schedule.slug for built in part.variants}
        new = [b for b in part.variants if (b.variant.key, slugs[b.variant]) not in seen]
        seen |= {(variant.key, slug) for variant, slug in slugs.items()}
        if not new:
            continue
        folder = materialise(f"packages/{planned.origin.name}", render(part).files)
        for variant, case in _chosen(part, new, request, device, matrix=matrix):
            facts = (planned.origin.spec_file, variant, case, request.seed, device is None, slugs[variant])
            jobs.append(VerifyJob(folder, *facts, names[variant]))
    return jobs


def _chosen(
    planned: Plan, built: list[BuiltVariant], request: VerifyRequest, device: Device | None, *, matrix: bool
) -> list[tuple[Variant, Case]]:
    """Return the cases of variants that have one schedule each in this plan."""
    from m2gen.verify import cases, quick

    interpreted, arch = device is None, device.arch if device else PORTABLE.arch
    intervals = {b.variant: planned.interval(b.variant, arch) for b in built}
    if request.quick:
        return list(quick(intervals, interpreted=interpreted))
    found = {variant: cases(variant, c, interpreted=interpreted) for variant, c in intervals.items()}
    extent = {b.variant: _named_features(b, found[b.variant]) for b in built} if matrix else found
    return [(variant, case) for variant, every in extent.items() for case in every]


def _named_features(built: BuiltVariant, found: tuple[Case, ...]) -> tuple[Case, ...]:
    """Return the cases of the features that a variant's layers are named after, or all if a layer has another name."""
    from m2gen.verify import Feature, only

    named = [{f for f in Feature if name == f or name.startswith(f"{f}_")} for name in built.layers]
    return only(set().union(*named), found) if all(named) else found


def _selected(jobs: list[VerifyJob], request: VerifyRequest) -> list[VerifyJob]:
    """Return the jobs of the variant, features and case that the request names; raises UsageError if there are none."""
    variants = dict.fromkeys(job.variant.key for job in jobs)
    if request.variant is not None and request.variant not in variants:
        raise UsageError(f"--variant must be {among(variants)}, got {request.variant!r}")
    jobs = [job for job in jobs if request.variant in (None, job.variant.key)]
    features = dict.fromkeys(str(job.case.feature) for job in jobs)
    for feature in request.features:
        if feature not in features:
            raise UsageError(f"--feature must be {among(features)}, got {feature!r}")
    jobs = [job for job in jobs if not request.features or job.case.feature in request.features]
    names = dict.fromkeys(job.case.name for job in jobs)
    if request.case is not None and request.case not in names:
        raise UsageError(f"--case must be {among(names)}, got {request.case!r}")
    return [job for job in jobs if request.case in (None, job.case.name)]


def _outcome(jobs: list[VerifyJob], device: Device | None, options: str, progress: Progress) -> VerifyOutcome:
    """Run jobs and time them by the clock."""
    start = time.monotonic()
    reports = run_jobs(jobs, progress, interpreted=device is None)
    return VerifyOutcome(device.name if device else "interpreter", reports, time.monotonic() - start, options)


def failed(reports: Sequence[CaseReport]) -> list[tuple[CaseReport, TensorResult | None]]:
    """Return (report, tensor result) of every tensor over budget, and (report, None) of every case without results."""
    found: list[tuple[CaseReport, TensorResult | None]] = []
    for report in reports:
        found += [(report, None)] if report.failure else []
        found += [(report, result) for result in report.results if not result.passed]
    return found


def reproduce(report: CaseReport, options: str = "") -> str:
    """Return the command that reproduces one case of a plan, which ``options`` give, or the name of its spec alone."""
    given = options or shlex.join(["--spec", report.spec])
    return f"m2gen verify {given} --variant {report.variant} --case {report.case} --seed {report.seed}"


def failure_lines(outcome: VerifyOutcome) -> list[str]:
    """Return a line for each failure, with the command that reproduces it."""
    lines = []
    for report, result in failed(outcome.reports):
        what = report.failure if result is None else f"{result.tensor} {result.verdict}"
        kernels = f" ({parse(report.schedule).describe()})" if report.schedule else ""
        again = reproduce(report, outcome.options)
        lines.append(f"{report.name or report.variant} {report.case}{kernels}: {what}; reproduce: {again}")
    return lines
