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
from m2gen.spec import Objective
from m2gen.tune.space import Subject
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
    subject, schedule = task.subject, task.schedule
    source = render_kernel(Lowering(subject.variant, schedule))
    device = replace(subject.device, name="", sm_count=0)  # no kernel depends on these
    sizes = f"{subject.batch} {subject.seq} {subject.objective}"
    key = key_of(VERSION, toolchain(), repr(device), sizes, _launchers(), source)
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


def _launchers() -> str:
    """Return the text of what decides the arguments' types, and so the binaries."""
    from m2gen.runtime import launchers

    return inspect.getsource(launchers)


def _compile(task: CompileTask) -> Compiled:
    from m2gen.tune.candidate import load

    subject, schedule = task.subject, task.schedule
    start = time.monotonic()
    module = load(subject.variant, schedule)
    kernels: list[Any] = []
    with absent.compiling(absent.Target(*backend_of(subject.device)), lambda kernel: _once(kernels, kernel)):
        for call in _calls(subject, module):
            call.results()
    every = [(resources_of(kernel, subject.device), kernel.metadata.num_warps) for kernel in kernels]
    reasons = [reason for resources, warps in every for reason in resources.limits(subject.device, warps)]
    failure = Failure.of(Reason.LAUNCH, reasons[0]) if reasons else None
    sides = ("forward", "backward") if subject.objective is Objective.TRAIN else ("forward",)
    resources = [_first(every, kernels, side) for side in sides]
    name = _binary(task, kernels, every)
    return Compiled(*_worst(resources), binary=name, failure=failure, seconds=time.monotonic() - start)


def _once(kernels: list[Any], kernel: Any) -> None:
    """Add a kernel unless it is there."""
    if all(kernel is not known for known in kernels):
        kernels.append(kernel)


def _first(every: list[tuple[Resources, int]], kernels: list[Any], side: str) -> Resources:
    """Return the resources of the kernel that is timed, the first one compiled for its direction."""
    return next(one for (one, _), kernel in zip(every, kernels, strict=True) if f"_{side}_" in kernel.metadata.name)


def _worst(resources: list[Resources]) -> tuple[int, int, int]:
    return (
        max(one.registers for one in resources),
        sum(one.spill_bytes for one in resources),
        max(one.shared_bytes for one in resources),
    )


def _binary(task: CompileTask, kernels: list[Any], every: list[tuple[Resources, int]]) -> str:
    """Return a name for the machine code and its launch: grids, buffers and checkpoints."""
    schedule, variant = task.schedule, task.subject.variant
    launched = (
        schedule.interval,
        schedule.forward.parts(variant),
        schedule.backward.parts(variant),
        schedule.two_level and schedule.backward.chunk,
        schedule.forward.reduction,
        schedule.backward.reduction,
    )
    code = [binary_of(kernel, task.subject.device).hex() for kernel in kernels]
    taken = [f"{warps} {resources.shared_bytes}" for resources, warps in every]
    return key_of(repr(launched), *code, *taken)


def _calls(subject: Subject, module: Any) -> Iterator[Any]:
    """Yield the call that is timed, then those of the check, on meta tensors."""
    from m2gen.problem import Problem
    from m2gen.tune.candidate import KernelCall, blank
    from m2gen.tune.check import call_of

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
