"""Run a plan's package against the float64 reference, on the GPU or in interpreter processes."""

from __future__ import annotations

import os
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m2gen.cache import materialise
from m2gen.compile import load_module, worker_pool, workers
from m2gen.device import PORTABLE, detect
from m2gen.errors import UsageError
from m2gen.pipeline.plan import Plan, Progress, render
from m2gen.variant import Variant

if TYPE_CHECKING:  # importing these imports torch, and the interpreter's processes must set their environment first
    from m2gen.verify import Case, CaseReport, TensorResult

    _Job = tuple[Path, Variant, Case, int, bool]


@dataclass(frozen=True)
class VerifyRequest:
    """What to verify of a plan: everything, or one variant or case, with a seed."""

    variant: str | None = None
    case: str | None = None
    seed: int = 0
    quick: bool = False
    """One case a variant where the interpreter runs them."""


@dataclass(frozen=True)
class VerifyOutcome:
    """Every case's report, and where the kernels ran."""

    backend: str
    reports: tuple[CaseReport, ...]

    @property
    def passed(self) -> bool:
        return all(report.passed for report in self.reports)


def verify(planned: Plan, request: VerifyRequest, progress: Progress) -> VerifyOutcome:
    """Run the package that the plan renders against the float64 reference: on the GPU, else in the interpreter."""
    device = detect()
    folder = materialise(f"packages/{planned.origin.name}", render(planned).files)
    arch = device.arch if device else PORTABLE.arch
    interpreted = device is None
    jobs: list[_Job] = [
        (folder, variant, case, request.seed, interpreted)
        for variant in _selected(planned, request)
        for case in _selected_cases(variant, planned.interval(variant, arch), interpreted, request)
    ]
    progress.start("verify", len(jobs))
    if interpreted:
        reports = _verify_interpreted(jobs, progress)
    else:
        reports = [_advance(progress, _verify_case(*job)) for job in jobs]
    progress.finish()
    return VerifyOutcome(device.name if device else "interpreter", tuple(reports))


def _selected(planned: Plan, request: VerifyRequest) -> list[Variant]:
    every = [built.variant for built in planned.variants]
    chosen = [variant for variant in every if request.variant in (None, variant.key)]
    if not chosen:
        raise UsageError(f"--variant must be among {', '.join(v.key for v in every)}, got {request.variant!r}")
    return chosen


def _selected_cases(variant: Variant, interval: int, interpreted: bool, request: VerifyRequest) -> list[Case]:
    from m2gen.verify import cases

    every = cases(variant, interval, interpreted=interpreted, quick=request.quick)
    chosen = [case for case in every if request.case in (None, case.name)]
    if not chosen:
        raise UsageError(f"--case must be among {', '.join(case.name for case in every)}, got {request.case!r}")
    return chosen


def _advance(progress: Progress, report: CaseReport) -> CaseReport:
    progress.advance(f"{report.variant} {report.case}")
    return report


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _verify_case(folder: Path, variant: Variant, case: Case, seed: int, interpreted: bool) -> CaseReport:
    import torch

    from m2gen.verify import run_case

    module = load_module(folder / "__init__.py", f"m2gen_package_{folder.name}")
    device = torch.device("cpu" if interpreted else "cuda")
    if interpreted:
        torch.set_num_threads(1)
    return run_case(module.m2rnn, variant, case, seed, device)


def _verify_interpreted(jobs: list[_Job], progress: Progress) -> list[CaseReport]:
    """Run cases in interpreter processes, longest first; results keep the order of ``jobs``."""
    reports: dict[int, CaseReport] = {}
    order = sorted(range(len(jobs)), key=lambda i: -jobs[i][1].total_heads)
    with worker_pool(min(workers(), len(jobs)), _interpret) as pool:
        futures = {pool.submit(_verify_case, *jobs[i]): i for i in order}
        for future in as_completed(futures):
            reports[futures[future]] = _advance(progress, future.result())
    return [reports[i] for i in range(len(jobs))]


def failed(outcome: VerifyOutcome) -> list[tuple[CaseReport, TensorResult]]:
    """Return (report, tensor result) of everything over budget."""
    return [(report, result) for report in outcome.reports for result in report.results if not result.passed]


def reproduce(planned: Plan, report: CaseReport) -> str:
    """Return the command that runs one case again."""
    spec = planned.origin.spec_file
    return f"m2gen verify --spec {spec} --variant {report.variant} --case {report.case} --seed {report.seed}"


def failure_line(planned: Plan, report: CaseReport, result: TensorResult) -> str:
    """Say in one line what is over budget and how to see it again."""
    where = f"{report.variant} {report.case}: {result.tensor}"
    return (
        f"{where} must be within {result.budget:.2e}, got {result.error:.2e}; reproduce: {reproduce(planned, report)}"
    )
