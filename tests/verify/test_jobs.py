"""Cases run in processes: one that never ends is a failed case, and the others have their turn."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support import make_variant

import m2gen.pipeline.verify_jobs as module
from m2gen.pipeline.verify_jobs import VerifyJob, run_jobs
from m2gen.problem import Problem
from m2gen.verify import Case, CaseReport


class Silent:
    """Shows no progress."""

    def start(self, stage: str, total: int) -> None: ...
    def advance(self, item: str) -> None: ...
    def finish(self) -> None: ...


def _never(job: VerifyJob) -> CaseReport:
    while True:
        time.sleep(1e6)


@pytest.mark.parametrize("interpreted", [True, False])
def test_a_case_that_never_ends_has_failed(monkeypatch: pytest.MonkeyPatch, interpreted: bool) -> None:
    """A kernel whose compiler or launch hangs costs its case; reports are in the order of the jobs."""
    monkeypatch.setattr(module, "_verify_job", _never)
    for name in ("INTERPRETER_SECONDS", "GPU_SECONDS"):
        monkeypatch.setattr(module, name, 0.0)
    variant, folder = make_variant(), Path("nowhere")
    cases = [Case(name, Problem(1, 4)) for name in ("one", "two")]
    jobs = [VerifyJob(folder, "a.yaml", variant, case, 7, interpreted, "slug", "layer fp32") for case in cases]
    reports = run_jobs(jobs, Silent(), interpreted=interpreted)
    assert [(x.case, x.passed, x.failure) for x in reports] == [(c.name, False, "took longer than 0 s") for c in cases]
    assert {(x.spec, x.schedule, x.name, x.seed) for x in reports} == {("a.yaml", "slug", "layer fp32", 7)}
