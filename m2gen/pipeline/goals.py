"""What to tune: the searches that a request asks of a plan's workloads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from m2gen.db import Database
from m2gen.device import Device
from m2gen.errors import UsageError
from m2gen.pipeline.plan import Plan
from m2gen.schedule.layer_knobs import LayerKernel
from m2gen.schedule.tunable import Tunable, kernels_of
from m2gen.spec import Objective, Workload
from m2gen.tune.kernels import SearchedKernels
from m2gen.tune.memory import USUAL, MemoryBound
from m2gen.tune.records import key_of_subject
from m2gen.tune.sampler import Sampler
from m2gen.tune.subject import Subject
from m2gen.variant import Variant

DECODED = 64
"""Sequences of which a token each is decoded where the decode kernel is timed."""


@dataclass(frozen=True)
class TuneRequest:
    """The layers to tune, the limits of searches, and the database for the results."""

    database: Database
    layers: tuple[str, ...] = ()
    """Names of layers; if empty, all that have workloads."""
    seconds: float | None = None
    """Time for all searches together; the spec's budget if None."""
    trials: int | None = None
    """Maximum number of candidates of each search."""
    seed: int = 0
    sampler: Sampler = Sampler.TPE
    objective: Objective | None = None
    memory: MemoryBound = USUAL
    kernels: SearchedKernels = SearchedKernels.RECURRENCE
    storage: str | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Goal:
    """One search: its subject, and the first layer of the spec that needs it."""

    layer: str
    subject: Subject
    variant: Variant
    """The variant of the plan, whose numerics the subject of a kernel has not."""


def goals(planned: Plan, request: TuneRequest, device: Device) -> list[Goal]:
    """Return a search for every variant and bucket of the plan's workloads, with the first workload of the bucket.

    Of the kernels around recurrences there is one for each kernel and variant, with the workload of most tokens. Raises
    UsageError for a layer that is unknown or was asked for without workloads, and if no layer has a workload.
    """
    objective = request.objective or planned.spec.tuning.objective
    every = list(_workloads(planned, request))
    if bare := dict.fromkeys(request.layers).keys() - {name for name, *_ in every}:
        raise UsageError(f"{', '.join(sorted(bare))} must have workloads of equal sequences to tune for, got none")
    if not every:
        raise UsageError(f"{planned.origin.spec_file} must have a layer with workloads to tune for, got none")
    found: dict[object, Goal] = {}
    if request.kernels is not SearchedKernels.LAYER:
        for name, variant, workload in every:
            subject = Subject(variant, device, objective, workload.batch, workload.seq, request.memory)
            found.setdefault(key_of_subject(subject), Goal(name, subject, variant))
    if request.kernels is not SearchedKernels.RECURRENCE:
        usual = Subject(every[0][1], device, objective, 1, 1, request.memory)
        for goal in _layer_goals(every, usual):
            found.setdefault(key_of_subject(goal.subject), goal)
    if not found:
        what = "a layer whose v has as many heads as its state, which others have no kernels around"
        raise UsageError(f"{planned.origin.spec_file} must have {what}, got none")
    return list(found.values())


_Asked = tuple[str, Variant, Workload]


def _workloads(planned: Plan, request: TuneRequest) -> Iterator[_Asked]:
    """Yield the workloads of equal sequences of the layers in question, with the names of layers, and variants."""
    layers = planned.layers(request.layers)
    for built in planned.variants:
        for name in built.layers:
            for workload in layers[name].workloads if name in layers else ():
                if not workload.packed:
                    yield name, built.variant, workload


def _layer_goals(asked: Iterable[_Asked], usual: Subject) -> Iterator[Goal]:
    """Yield the searches of the kernels around each recurrence; of a gate that this computes, there is no kernel."""
    largest: dict[Variant, _Asked] = {}
    for each in asked:
        _, variant, workload = each
        if variant not in largest or workload.batch * workload.seq > _tokens(largest[variant]):
            largest[variant] = each
    for name, variant, workload in largest.values():
        for kernel in kernels_of(usual.objective, variant):
            if kernel is LayerKernel.DECAY and variant.computes_gate:
                continue
            batch, seq = (DECODED, 1) if kernel is LayerKernel.DECODE else (workload.batch, workload.seq)
            plain = Tunable.around(variant, kernel).variant
            yield Goal(name, replace(usual, variant=plain, batch=batch, seq=seq, kernel=kernel), variant)


def _tokens(asked: _Asked) -> int:
    return asked[2].batch * asked[2].seq
