"""The worker process on the GPU, which checks and times candidates; it may crash or hang."""

from __future__ import annotations

import time
import traceback
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from m2gen.cache import is_of_a_disk
from m2gen.measure.gpu import Captures, gpu_service, raised, torch_device
from m2gen.schedule import Schedule
from m2gen.schedule.layer_knobs import Tiles
from m2gen.tune.subject import Subject
from m2gen.tune.trial import Measurement, Step, Task

if TYPE_CHECKING:  # these import torch, and a worker must set its environment first
    from m2gen.measure.checks import SeededCase, Verdict
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
    from m2gen.tune.clock import sampled, screened

    _CLOCKS.enter(task.subject)
    if task.step is Step.TIME:
        return Measurement(samples=sampled(_clock(task)))
    if task.step is Step.PREPARE:
        _prepare(task)
        return Measurement()
    verdict = _checked(task)
    if verdict.failure or task.step is not Step.SCREEN:
        return Measurement(verdict.errors, failure=verdict.failure)
    try:
        return Measurement(verdict.errors, screened(_clock(task), task.best_ms))
    finally:
        _CLOCKS.clear()


def _prepare(task: Task) -> None:
    from m2gen.measure.checks import prepare
    from m2gen.tune.layer import worker

    if task.subject.kernel is not None:
        worker.prepare(task.subject, torch_device())
    else:
        prepare(task.subject.variant, _asked(task), torch_device())


def _checked(task: Task) -> Verdict:
    from m2gen.tune.check import check_candidate
    from m2gen.tune.layer import worker

    subject, schedule, device = task.subject, task.schedule, torch_device()
    if isinstance(schedule, Tiles):
        return worker.check_tiles(subject, schedule, worker.asked_of(subject, task.step), device)
    return check_candidate(_candidate(subject, schedule), _asked(task), device)


def _asked(task: Task) -> tuple[SeededCase, ...]:
    from m2gen.measure.checks import STEPS, seeded_cases

    variant = task.subject.variant
    asked = seeded_cases(variant, STEPS, held_out=task.step is Step.HELD_OUT)
    return asked + seeded_cases(variant, STEPS, held_out=True) if task.step is Step.VERIFY else asked


def _candidate(subject: Subject, schedule: Schedule) -> Candidate:
    from m2gen.tune.candidate import load
    from m2gen.tune.check import Candidate

    return Candidate(load(subject.variant, schedule), subject.variant, schedule, subject.objective)


def _clock(task: Task) -> Clock:
    """Return the candidate's captured calls, kept from its last round or captured now."""
    from m2gen.tune.candidate import KernelCall
    from m2gen.tune.clock import captured
    from m2gen.tune.layer import worker

    subject, schedule, seed = task.subject, task.schedule, task.seed

    def capture() -> Clock:
        if isinstance(schedule, Tiles):
            return worker.capture(subject, schedule, seed, torch_device())
        return captured(KernelCall(_candidate(subject, schedule).module, _inputs(subject, seed), subject.objective))

    return _CLOCKS.get(task.schedule, capture)


@lru_cache(maxsize=1)
def _inputs(subject: Subject, seed: int) -> Inputs:
    from m2gen.problem import Problem, make_inputs

    return make_inputs(subject.variant, Problem(subject.batch, subject.seq), seed).to(torch_device())


GPU = gpu_service(serve, SECONDS, lambda failure: Measurement(failure=failure))
