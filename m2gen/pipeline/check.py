"""Cross-compile every kernel of a plan, and check its resources."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from m2gen.cache import load_result, store_result
from m2gen.db.choice import Choice
from m2gen.device import PORTABLE
from m2gen.errors import CompileError, M2genError
from m2gen.kernels.compile import Job, compile_kernel
from m2gen.kernels.demand import demand_of
from m2gen.kernels.lowering import Direction, Lowering
from m2gen.kernels.resources import Resources
from m2gen.measure.workers import Lost, Service, cpus, run_isolated, without_interpreter
from m2gen.pipeline.plan import Plan, Progress

SECONDS = 600.0
"""Longest that the compilation of a kernel may take."""


@dataclass(frozen=True)
class CheckRow:
    """One kernel on one target: its resources, and why it cannot compile or launch, if so."""

    variant: str
    kernel: str
    arch: str
    schedule: str
    resources: Resources | None
    problems: tuple[str, ...]
    source: str = "default"
    """Tiers and record ids of the schedule, separated by commas."""
    notes: tuple[str, ...] = ()
    """Notes on what is slow rather than wrong: spills, and the tiles that take the registers."""
    name: str = ""
    """Name of the variant: its layers and dtype."""

    @property
    def place(self) -> str:
        """The kernel's name in messages."""
        return f"{self.name or self.variant} {self.kernel} on {self.arch}"


def check(planned: Plan, progress: Progress) -> list[CheckRow]:
    """Cross-compile every kernel for every target, and check its resources."""
    jobs: dict[Job, list[Choice]] = {}
    for choice in planned.choices:
        if choice.device == PORTABLE:
            continue
        lowering = Lowering(choice.variant, choice.schedule)
        for direction in Direction:
            job = Job(lowering, direction, choice.device)
            jobs.setdefault(job, []).append(choice)
    names = planned.names
    progress.start("compile", len(jobs))
    results = compile_all(
        jobs,
        cpus(),
        lambda job: progress.advance(f"{names[job.lowering.variant]} {job.direction} for {job.device.arch}"),
    )
    progress.finish()
    return [_check_row(names[job.lowering.variant], job, choices, results[job]) for job, choices in jobs.items()]


def compile_all(
    jobs: Iterable[Job], processes: int, done: Callable[[Job], None] = lambda job: None
) -> dict[Job, Resources | CompileError]:
    """Cross-compile in parallel processes, each distinct kernel once; call ``done`` for each job as it is done.

    A kernel whose compiler takes longer than ``SECONDS`` or crashes has a CompileError that says so.
    """
    results: dict[Job, Resources | CompileError] = {}
    missing: dict[str, list[Job]] = {}
    for job in dict.fromkeys(jobs):
        known = load_result("resources", job.key, Resources)
        if known is None:
            missing.setdefault(job.key, []).append(job)
        else:
            results[job] = known
            done(job)
    for job, result in run_isolated([same[:1] for same in missing.values()], COMPILE, processes):
        if isinstance(result, Resources):
            store_result("resources", job.key, result)
        elif not isinstance(result, CompileError):  # not the kernel's fault: a full disk, say
            raise result
        for same in missing[job.key]:
            results[same] = result
            done(same)
    return results


def _compile(job: Job) -> Resources | M2genError:
    try:
        return compile_kernel(job)
    except M2genError as error:
        return error


def _lost(job: Job, lost: Lost) -> Resources | M2genError:
    return CompileError(f"{job.name}: {lost.at('compiling')}")


COMPILE: Service[Job, Resources | M2genError] = Service(_compile, without_interpreter, SECONDS, _lost)


def _check_row(name: str, job: Job, choices: list[Choice], result: Resources | CompileError) -> CheckRow:
    resources = result if isinstance(result, Resources) else None
    problems = (str(result),) if resources is None else resources.limits(job.device, job.warps)
    schedule, source = choices[0].schedule.slug, ", ".join(dict.fromkeys(choice.source for choice in choices))
    notes = () if resources is None else _notes(job, resources)
    kernel = (job.lowering.variant.key, str(job.direction), job.device.arch, schedule)
    return CheckRow(*kernel, resources, problems, source, notes, name)


def _notes(job: Job, resources: Resources) -> tuple[str, ...]:
    """Return which tiles take the registers of a kernel that spills."""
    if not resources.spill_bytes:
        return ()
    demand = demand_of(job.lowering, job.direction, job.device.warp_size)
    tiles = f"tiles of the state alone take {demand.states} of {job.device.registers} registers a thread"
    return (f"spills: {tiles}, and state weights {demand.weights}",)
