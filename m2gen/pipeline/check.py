"""Cross-compile every kernel of a plan and judge what it takes."""

from __future__ import annotations

from dataclasses import dataclass

from m2gen.db.choice import Choice
from m2gen.device import PORTABLE
from m2gen.errors import CompileError
from m2gen.kernels.arguments import Direction
from m2gen.kernels.compile import Job, compile_all, workers
from m2gen.kernels.demand import demand_of
from m2gen.kernels.render import render_kernel
from m2gen.kernels.resources import Resources
from m2gen.pipeline.plan import Plan, Progress


@dataclass(frozen=True)
class CheckRow:
    """One kernel on one target: what it takes, and why it cannot launch or compile, if so."""

    variant: str
    kernel: str
    arch: str
    schedule: str
    resources: Resources | None
    problems: tuple[str, ...]
    source: str = "default"
    """Tiers, and ids of records, that the schedule comes from."""
    notes: tuple[str, ...] = ()
    """What is slow rather than wrong: spills, and what takes the registers."""
    name: str = ""
    """Of the variant, by its layers and dtype."""

    @property
    def place(self) -> str:
        """The kernel, as messages name it."""
        return f"{self.name or self.variant} {self.kernel} on {self.arch}"


def check(planned: Plan, progress: Progress) -> list[CheckRow]:
    """Cross-compile every kernel of every target and judge what it takes."""
    jobs: dict[Job, list[Choice]] = {}
    for choice in planned.choices:
        if choice.device == PORTABLE:
            continue
        source = render_kernel(choice.variant, choice.schedule, "")
        for direction in Direction:
            job = Job(choice.variant, choice.schedule, direction, choice.device, source)
            jobs.setdefault(job, []).append(choice)
    names = planned.names
    progress.start("compile", len(jobs))
    results = compile_all(
        jobs, workers(), lambda job: progress.advance(f"{names[job.variant]} {job.direction} for {job.device.arch}")
    )
    progress.finish()
    return [_check_row(names[job.variant], job, choices, results[job]) for job, choices in jobs.items()]


def _check_row(name: str, job: Job, choices: list[Choice], result: Resources | CompileError) -> CheckRow:
    resources = result if isinstance(result, Resources) else None
    problems = (str(result),) if resources is None else resources.limits(job.device, job.warps)
    schedule, source = choices[0].schedule.slug, ", ".join(dict.fromkeys(choice.source for choice in choices))
    notes = () if resources is None else _notes(job, resources)
    kernel = (job.variant.key, str(job.direction), job.device.arch, schedule)
    return CheckRow(*kernel, resources, problems, source, notes, name)


def _notes(job: Job, resources: Resources) -> tuple[str, ...]:
    """Say what takes the registers of a kernel that spills."""
    if not resources.spill_bytes:
        return ()
    part = job.schedule.backward if job.direction is Direction.BACKWARD else job.schedule.forward
    demand = demand_of(job.variant, part, job.device.warp_size, job.schedule.layouts)
    tiles = f"tiles of the state alone take {demand.states} of {job.device.registers} registers a thread"
    return (f"spills: {tiles}, and state weights {demand.weights}",)
