"""Time the layers of a plan side by side with other layers, on the GPU at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from m2gen.bench.kinds import Call
from m2gen.bench.layers.entries import LayerContext, LayerUnderTest, LayerWorkload
from m2gen.bench.layers.kinds import LayerKind
from m2gen.bench.layers.side_by_side import LayerTimes, layers_side_by_side
from m2gen.bench.layers.worker import GPU
from m2gen.bench.peers import LAYERS, check_chosen, peers
from m2gen.bucket import bucket_of
from m2gen.errors import UsageError
from m2gen.measure import lock
from m2gen.measure.context import this_context
from m2gen.measure.workers import Worker
from m2gen.pipeline.packages import Packages
from m2gen.pipeline.plan import Plan, Progress


@dataclass(frozen=True)
class LayersRequest:
    """The layers and sizes to time."""

    layers: tuple[str, ...] = ()
    """Names of the spec's layers; if empty, all that have workloads and a ``hidden``."""
    kinds: tuple[LayerKind, ...] = tuple(LayerKind)
    operators: tuple[str, ...] = ()
    """Adapters of operators, in addition to those that installed packages register."""
    peers: tuple[str, ...] = ()
    """Adapters of layers, in addition to those that installed packages register."""
    timing_only: bool = False
    """Whether peers are timed although their results fail the check or they refuse to run here."""
    decode: tuple[int, ...] = ()
    """Batch sizes for which one token is decoded."""
    seed: int = 0
    """Seed of the order of rounds and of resampling."""


@contextmanager
def this_layer_context(command: str) -> Iterator[LayerContext]:
    """Lock the GPU at hand and start a worker process; raises UsageError if there is no GPU."""
    here = this_context(command)
    timer = Worker(GPU)
    try:
        with lock.exclusive(here.gpu):
            yield LayerContext(here.device, here.environment, here.gpu, here.worker, timer)
    finally:
        timer.stop()


def layer_workloads(planned: Plan, request: LayersRequest) -> list[LayerWorkload]:
    """Return the layers' workloads, and their decoding after the tokens of the first one.

    Raises UsageError for an unknown layer, one that was asked for without ``hidden`` or workloads, or if none has both.
    """
    layers = planned.layers(request.layers)
    for name in request.layers:
        for field in ("hidden", "workloads"):
            if not getattr(layers[name], field):
                raise UsageError(f"$.layers.{name} must have {field} for its layer to be timed, got none")
        if all(workload.packed for workload in layers[name].workloads):
            raise UsageError(f"$.layers.{name} must have unpacked workloads for its layer to be timed, got none")
    if request.kinds != tuple(LayerKind):  # of which all are timed that there are
        check_chosen("--layer-kind operator", LayerKind.OPERATOR in request.kinds, request.operators)
        check_chosen("--layer-kind peer", LayerKind.PEER in request.kinds, request.peers, LAYERS)
    found = []
    for built in planned.variants:
        for name in built.layers:
            layer = layers.get(name)
            if layer is None or layer.hidden is None:
                continue
            dense = [w for w in layer.workloads if not w.packed]
            sizes = [(w.batch, w.seq, Call.SEQUENCE) for w in dense]
            sizes += [(batch, w.seq, Call.DECODE) for batch in request.decode for w in dense[:1]]
            found += [LayerWorkload(name, built.variant, layer.hidden, *size) for size in sizes]
    if not found:
        raise UsageError("the spec must have layers with hidden and unpacked workloads to be timed, got none")
    return found


def bench_layers(
    planned: Plan, request: LayersRequest, context: LayerContext, progress: Progress
) -> Iterator[tuple[LayerTimes, ...]]:
    """Yield the results of each workload as they are known."""
    jobs = layer_workloads(planned, request)
    packages = Packages(planned)
    progress.start("bench layers", len(jobs))
    try:
        for workload in jobs:
            layers = _layers(packages, workload, request, context)
            yield tuple(layers_side_by_side(workload, layers, context, request.seed))
            progress.advance(workload.name)
    finally:
        progress.finish()


def _layers(
    packages: Packages, workload: LayerWorkload, request: LayersRequest, context: LayerContext
) -> list[LayerUnderTest]:
    bucket = bucket_of(workload.batch, workload.variant.total_heads, context.device.sm_count)
    choice, folder = packages.serving(workload.variant, context.device.arch, bucket)
    passed = request.timing_only
    found = [LayerUnderTest(kind, choice.source, folder) for kind in (LayerKind.EAGER, LayerKind.COMPILED)]
    found += [
        LayerUnderTest(LayerKind.OPERATOR, adapter, folder, f"{name} in m2gen's layer", passed)
        for name, adapter in peers(request.operators).items()
    ]
    found.append(LayerUnderTest(LayerKind.ATTENTION))
    found += [
        LayerUnderTest(LayerKind.PEER, adapter, folder, name, passed)
        for name, adapter in peers(request.peers, LAYERS).items()
    ]
    return [layer for layer in found if layer.kind in request.kinds]
