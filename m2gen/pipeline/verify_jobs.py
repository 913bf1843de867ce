"""Run verification cases in worker processes, on the GPU or in the interpreter."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from m2gen.kernels.compile import load_module
from m2gen.measure.workers import Lost, Service, cpus, run_isolated, without_interpreter
from m2gen.pipeline.plan import Progress
from m2gen.variant import Variant

if TYPE_CHECKING:  # importing these imports torch, and worker processes must set their environment first
    from m2gen.verify import Case, CaseReport

GPU_PROCESSES = 12
"""Maximum number of processes on the GPU: each has its own context, and most of the time goes into compiling."""
GPU_SECONDS = 300.0
INTERPRETER_SECONDS = 900.0


@dataclass(frozen=True)
class VerifyJob:
    """One case on one package."""

    folder: Path
    spec: str
    variant: Variant
    case: Case
    seed: int
    interpreted: bool
    schedule: str
    name: str


def run_jobs(jobs: list[VerifyJob], progress: Progress, *, interpreted: bool) -> tuple[CaseReport, ...]:
    """Run jobs in worker processes, and return their reports in the order of ``jobs``."""
    seconds = INTERPRETER_SECONDS if interpreted else GPU_SECONDS
    service = Service(_verify_job, _interpret if interpreted else _use_gpu, seconds, _lost, _untrusted)
    processes = cpus() if interpreted else min(cpus(), GPU_PROCESSES)
    reports: dict[VerifyJob, CaseReport] = {}
    progress.start("verify", len(jobs))
    for job, report in run_isolated(_groups(jobs, alone=interpreted), service, processes):
        reports[job] = report
        progress.advance(f"{report.name} {report.feature} {report.case}")
    progress.finish()
    return tuple(reports[job] for job in jobs)


def _groups(jobs: Iterable[VerifyJob], *, alone: bool) -> list[list[VerifyJob]]:
    """Group jobs that share compiled kernels; the groups that take longest come first."""
    groups: dict[object, list[VerifyJob]] = {}
    for job in jobs:
        groups.setdefault(job if alone else (job.folder, job.variant, job.case.feature), []).append(job)
    return sorted(groups.values(), key=lambda group: -sum(map(_cost, group)))


def _cost(job: VerifyJob) -> float:
    """Return a rough cost of a job in units of a small case, from what it compiles, steps and tiles."""
    from m2gen.verify import Check

    tiles = job.variant.padded_rows * job.variant.padded_cols / 4096
    steps = max(job.case.problem.seq, sum(job.case.problem.lengths or ()))
    if job.interpreted:
        tiles *= job.variant.total_heads * steps
    compiles = {Check.COMPILE: 20.0, Check.OPCHECK: 10.0, Check.SINGLE: 10.0, Check.GRAPH: 5.0}
    return compiles.get(job.case.check, 1.0) + tiles + steps / 200


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)  # exp2 overflows where tanh is 1
    import torch

    torch.set_num_threads(1)


def _use_gpu() -> None:
    without_interpreter()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # there are as many processes as cores


def _verify_job(job: VerifyJob) -> CaseReport:
    """Run one case; a package that cannot be imported is a failed case as well."""
    import torch

    from m2gen.verify import one_line, report, run_case

    device = torch.device("cpu" if job.interpreted else "cuda")
    try:
        module = load_module(job.folder / "__init__.py", f"m2gen_package_{job.folder.name}")
    except Exception as error:  # importing a generated module may raise anything
        return _of(job, report(job.variant, job.case, job.seed, failure=one_line(error)))
    found = run_case(module, job.variant, job.case, job.seed, device)
    if not job.interpreted:
        torch.cuda.empty_cache()  # a dozen processes share the GPU's memory
    return _of(job, found)


def _of(job: VerifyJob, report: CaseReport) -> CaseReport:
    """Return the report with the spec, schedule and name, which only the job knows."""
    return replace(report, spec=job.spec, schedule=job.schedule, name=job.name)


def _lost(job: VerifyJob, lost: Lost) -> CaseReport:
    from m2gen.verify import report

    return _of(job, report(job.variant, job.case, job.seed, failure=lost.reason))


def _untrusted(report: CaseReport) -> bool:
    """Return whether a process may be unusable: an error on a GPU stays with its context."""
    return bool(report.failure)
