"""The worker that has the GPU: gates and times candidates, one process that may crash or hang."""

from __future__ import annotations

import os
import time
import traceback
from collections import OrderedDict
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from m2gen.db import Failure, Reason
from m2gen.measure.workers import Lost, Service
from m2gen.tune.space import Subject
from m2gen.tune.trial import Measured, Step, Task

if TYPE_CHECKING:  # these import torch, and a worker must set its environment first
    from m2gen.problem import Inputs
    from m2gen.tune.clock import Clock
    from m2gen.tune.gate import Candidate

SECONDS = 90.0
"""Longest that a step may take, with the start of the process and the oracle's answers."""
AGAIN = 10
"""Samples of one turn of a finalist."""
TORCH_DEVICE = "cuda"
KEPT = 8
"""Captured candidates that stay on the GPU: finalists take turns."""
LONGEST_MESSAGE = 300

_CLOCKS: OrderedDict[tuple[Subject, str], Clock] = OrderedDict()


def start() -> None:
    """Set up the GPU worker: compiled kernels, never the interpreter's."""
    os.environ.pop("TRITON_INTERPRET", None)


def serve(task: Task) -> Measured:
    """Do one step; whatever is raised is the candidate's failure."""
    start = time.monotonic()
    try:
        found = _serve(task)
    except Exception as error:  # of a compiler, a driver or a kernel
        message = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_MESSAGE]
        found = Measured(failure=Failure(reason_of(error), message), details=traceback.format_exc())
    return replace(found, seconds=time.monotonic() - start)


def reason_of(error: Exception) -> Reason:
    """Say what an exception of a compiler, a driver or a kernel makes of the candidate that raised it."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in names:
        return Reason.MEMORY
    return Reason.LAUNCH if names & {"OutOfResources", "CompilationError", "PTXASError"} else Reason.CRASH


def _serve(task: Task) -> Measured:
    import torch

    from m2gen.tune.gate import STEPS, pass_gate, prepare, questions

    subject = task.subject
    if task.step is Step.TIME:
        return Measured(samples=_clock(task).again(AGAIN))
    device = torch.device(TORCH_DEVICE)
    asked = questions(subject.variant, STEPS, held_out=task.step is Step.HELD_OUT)
    if task.step is Step.VERIFY:
        asked += questions(subject.variant, STEPS, held_out=True)
    if task.step is Step.PREPARE:
        prepare(subject.variant, asked, device)
        return Measured()
    verdict = pass_gate(_candidate(task), asked, device)
    if verdict.failure or task.step is not Step.SCREEN:
        return Measured(verdict.errors, failure=verdict.failure)
    try:
        return Measured(verdict.errors, _clock(task).screen(task.best_ms))
    finally:
        _CLOCKS.clear()
        torch.cuda.empty_cache()


def _candidate(task: Task) -> Candidate:
    from m2gen.tune.candidate import load
    from m2gen.tune.gate import Candidate

    subject = task.subject
    return Candidate(load(subject.variant, task.schedule), subject.variant, task.schedule, subject.objective)


def _clock(task: Task) -> Clock:
    """Return the captured candidate, kept from its last turn or captured now; make room where there is none."""
    import torch

    key = (task.subject, task.schedule.slug)
    if key not in _CLOCKS:
        while len(_CLOCKS) >= KEPT:
            _CLOCKS.popitem(last=False)
        try:
            _CLOCKS[key] = _captured(task)
        except torch.OutOfMemoryError:
            if not _CLOCKS:
                raise
            _CLOCKS.clear()
            torch.cuda.empty_cache()
            _CLOCKS[key] = _captured(task)
    return _CLOCKS[key]


def _captured(task: Task) -> Clock:
    from m2gen.tune.candidate import Call
    from m2gen.tune.clock import Clock

    return Clock(Call(_candidate(task).module, _inputs(task.subject, task.seed), task.subject.objective))


@lru_cache(maxsize=1)
def _inputs(subject: Subject, seed: int) -> Inputs:
    import torch

    from m2gen.problem import Problem, make_inputs

    return make_inputs(subject.variant, Problem(subject.batch, subject.seq), seed).to(torch.device(TORCH_DEVICE))


def _lost(task: Task, lost: Lost) -> Measured:
    return Measured(failure=Failure(Reason.HANG if lost.hung else Reason.CRASH, lost.reason))


def _suspect(found: Measured) -> bool:
    """Whether the process may be unusable: an error of a kernel stays with its context."""
    return found.failure is not None and found.failure.reason is Reason.CRASH


GPU: Service[Task, Measured] = Service(serve, start, SECONDS, _lost, _suspect)
