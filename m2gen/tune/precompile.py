"""Compile a candidate without a GPU, for exactly the calls that the check and the clock will make.

The launchers run the candidate's kernels on meta tensors, with a driver for Triton that only knows its target. So
argument types, constants and divisibilities are those of the real call, and the GPU worker finds the kernels in
Triton's cache.
"""

from __future__ import annotations

import inspect
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from m2gen.cache import is_of_a_disk, key_of, load_result, store_result
from m2gen.db import Failure, Reason
from m2gen.kernels.compile import backend_of, telling, toolchain
from m2gen.kernels.lowering import Lowering
from m2gen.kernels.render import render_kernel
from m2gen.kernels.resources import Resources, binary_of, resources_of
from m2gen.measure.workers import Lost, Service, without_interpreter
from m2gen.runtime import absent
from m2gen.schedule.layer_knobs import Tiles
from m2gen.spec import Objective
from m2gen.tune.subject import Subject
from m2gen.tune.trial import Compiled, CompileTask
from m2gen.variant import Variant

SECONDS = 150.0
"""Longest that the compilation of a candidate may take; a slower one is excluded."""
VERSION = "2"


def prepare() -> None:
    """Set up a compile worker: no interpreter, no GPU, one thread."""
    without_interpreter()
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)


def precompile(task: CompileTask) -> Compiled:
    """Compile a candidate, or return the cached result for the same source and toolchain."""
    subject, source = task.subject, _source(task)
    device = replace(subject.device, name="", sm_count=0)  # no kernel depends on these
    sizes = f"{subject.batch} {subject.seq} {subject.objective}"
    sizes += f" {subject.kernel}" if subject.kernel else ""
    key = key_of(VERSION, toolchain(), repr(device), sizes, _launchers(subject), source)
    known = load_result("precompiled", key, Compiled)
    if known is not None:
        return known
    start = time.monotonic()
    try:
        found = _compile(task)
    except Exception as error:  # a compiler may raise anything
        told = telling(error)
        if is_of_a_disk(told):
            return Compiled(stopped=str(told), details=traceback.format_exc())
        message = f"{type(told).__name__}: {told}".strip().splitlines()[-1]
        return Compiled(
            failure=Failure.of(Reason.LAUNCH, message),
            seconds=time.monotonic() - start,
            details=traceback.format_exc(),
        )
    if found.failure is None:
        store_result("precompiled", key, replace(found, details=""))
    return found


def _launchers(subject: Subject) -> str:
    """Return the text of what decides the arguments' types, and so the binaries."""
    from m2gen.runtime import launchers, layer_launches, layer_step

    return "".join(map(inspect.getsource, (layer_launches, layer_step) if subject.kernel else (launchers,)))


def _source(task: CompileTask) -> str:
    """Return the text of a candidate's module."""
    from m2gen.tune.layer.calls import source_of

    variant, schedule = task.subject.variant, task.schedule
    return source_of(variant, schedule) if isinstance(schedule, Tiles) else render_kernel(Lowering(variant, schedule))


def _compile(task: CompileTask) -> Compiled:
    subject = task.subject
    start = time.monotonic()
    kernels: list[Any] = []
    with absent.compiling(absent.Target(*backend_of(subject.device)), lambda kernel: _once(kernels, kernel)):
        for call in _calls(task):
            call.results()
    every = [(resources_of(kernel, subject.device), kernel.metadata.num_warps) for kernel in kernels]
    reasons = [reason for resources, warps in every for reason in resources.limits(subject.device, warps)]
    failure = Failure.of(Reason.LAUNCH, reasons[0]) if reasons else None
    resources = [_first(every, kernels, side) for side in _sides(subject)]
    name = _binary(task, kernels, every)
    return Compiled(*_worst(resources), binary=name, failure=failure, seconds=time.monotonic() - start)


def _once(kernels: list[Any], kernel: Any) -> None:
    """Add a kernel unless it is there."""
    if all(kernel is not known for known in kernels):
        kernels.append(kernel)


def _sides(subject: Subject) -> tuple[str, ...]:
    """Return what the names of the kernels that are timed hold: directions, or the kernel around a recurrence."""
    if subject.kernel is not None:
        return (f"m2rnn_{subject.kernel}_kernel",)
    return ("_forward_", "_backward_") if subject.objective is Objective.TRAIN else ("_forward_",)


def _first(every: list[tuple[Resources, int]], kernels: list[Any], side: str) -> Resources:
    """Return the resources of the kernel that is timed, the first one compiled for its direction."""
    return next(one for (one, _), kernel in zip(every, kernels, strict=True) if side in kernel.metadata.name)


def _worst(resources: list[Resources]) -> tuple[int, int, int]:
    return (
        max(one.registers for one in resources),
        sum(one.spill_bytes for one in resources),
        max(one.shared_bytes for one in resources),
    )


def _binary(task: CompileTask, kernels: list[Any], every: list[tuple[Resources, int]]) -> str:
    """Return a name for the machine code and its launch: grids, buffers and checkpoints."""
    launched = _launched(task)
    code = [binary_of(kernel, task.subject.device).hex() for kernel in kernels]
    taken = [f"{warps} {resources.shared_bytes}" for resources, warps in every]
    return key_of(repr(launched), *code, *taken)


def _launched(task: CompileTask) -> Any:
    """Return what a launch depends on beside machine code."""
    from m2gen.tune.layer import worker

    schedule, variant = task.schedule, task.subject.variant
    if isinstance(schedule, Tiles):
        return worker.launched(task.subject, schedule)
    return (
        schedule.interval,
        schedule.forward.parts(variant),
        schedule.backward.parts(variant),
        schedule.two_level and schedule.backward.chunk,
        schedule.forward.reduction,
        schedule.backward.reduction,
    )


def _calls(task: CompileTask) -> Iterator[Any]:
    """Yield the call that is timed, then those of the check, on meta tensors."""
    from m2gen.problem import Problem
    from m2gen.tune.candidate import KernelCall, blank, load
    from m2gen.tune.check import call_of
    from m2gen.tune.layer import worker

    subject, schedule = task.subject, task.schedule
    if isinstance(schedule, Tiles):
        yield from worker.calls_of(subject, schedule)
        return
    module = load(subject.variant, schedule)
    asked = _checked_inputs(subject.variant)
    timed = blank(asked[0][1], Problem(subject.batch, subject.seq))
    yield KernelCall(module, timed, subject.objective)
    for case, inputs in asked:
        yield call_of(module, subject.objective, case, inputs)


@cache
def _checked_inputs(variant: Variant) -> list[tuple[Any, Any]]:
    import torch

    from m2gen.measure.checks import STEPS, seeded_cases
    from m2gen.verify.subject import inputs_of

    meta = torch.device("meta")
    every = (*seeded_cases(variant, STEPS), *seeded_cases(variant, STEPS, held_out=True))
    return [(q.case, inputs_of(variant, q.case, q.seed, meta)) for q in every]


def _lost(task: CompileTask, lost: Lost) -> Compiled:
    return Compiled(failure=Failure.of(Reason.LAUNCH, lost.at("compiling")))


PRECOMPILE: Service[CompileTask, Compiled] = Service(precompile, prepare, SECONDS, _lost)
