"""The worker process on the GPU, which checks and times candidates; it may crash or hang."""

from __future__ import annotations

import time
import traceback
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from m2gen.cache import is_of_a_disk
from m2gen.measure.gpu import Captures, gpu_service, raised, torch_device
from m2gen.tune.space import Subject
from m2gen.tune.trial import Measurement, Step, Task

if TYPE_CHECKING:  # these import torch, and a worker must set its environment first
    from m2gen.measure.clock import Clock
    from m2gen.problem import Inputs
    from m2gen.tune.check import Candidate

SECONDS = 90.0
"""Longest that a step may take, including the start of the process and the oracle's answers."""
KEPT = 8
"""Number of captured candidates that stay on the GPU, since finalists are timed in rounds."""

_CLOCKS: Captures[Clock] = Captures(KEPT)


def serve(task: Task) -> Measurement:
    """Do one step; any exception is the candidate's failure, unless a file could not be written."""
    start = time.monotonic()
    try:
        found = _serve(task)
    except Exception as error:  # raised by a compiler, a driver or a kernel
        if is_of_a_disk(error):
            return Measurement(stopped=str(error), details=traceback.format_exc())
        found = Measurement(failure=raised(error), details=traceback.format_exc())
    return replace(found, seconds=time.monotonic() - start)


def _serve(task: Task) -> Measurement:
    from m2gen.measure.checks import STEPS, prepare, seeded_cases
    from m2gen.tune.check import check_candidate
    from m2gen.tune.clock import sampled, screened

    subject, device = task.subject, torch_device()
    _CLOCKS.enter(subject)
    if task.step is Step.TIME:
        return Measurement(samples=sampled(_clock(task)))
    asked = seeded_cases(subject.variant, STEPS, held_out=task.step is Step.HELD_OUT)
    if task.step is Step.VERIFY:
        asked += seeded_cases(subject.variant, STEPS, held_out=True)
    if task.step is Step.PREPARE:
        prepare(subject.variant, asked, device)
        return Measurement()
    verdict = check_candidate(_candidate(task), asked, device)
    if verdict.failure or task.step is not Step.SCREEN:
        return Measurement(verdict.errors, failure=verdict.failure)
    try:
        return Measurement(verdict.errors, screened(_clock(task), task.best_ms))
    finally:
        _CLOCKS.clear()


def _candidate(task: Task) -> Candidate:
    from m2gen.tune.candidate import load
    from m2gen.tune.check import Candidate

    subject = task.subject
    return Candidate(load(subject.variant, task.schedule), subject.variant, task.schedule, subject.objective)


def _clock(task: Task) -> Clock:
    """Return the candidate's captured calls, kept from its last round or captured now."""
    from m2gen.tune.candidate import KernelCall
    from m2gen.tune.clock import captured

    def capture() -> Clock:
        return captured(KernelCall(_candidate(task).module, _inputs(task.subject, task.seed), task.subject.objective))

    return _CLOCKS.get(task.schedule, capture)


@lru_cache(maxsize=1)
def _inputs(subject: Subject, seed: int) -> Inputs:
    from m2gen.problem import Problem, make_inputs

    return make_inputs(subject.variant, Problem(subject.batch, subject.seq), seed).to(torch_device())


GPU = gpu_service(serve, SECONDS, lambda failure: Measurement(failure=failure))
