"""Time a plan's package on the GPU at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from m2gen.bucket import bucket_of
from m2gen.cache import materialise
from m2gen.choice import Choice
from m2gen.compile import load_module
from m2gen.device import detect
from m2gen.errors import UsageError
from m2gen.pipeline.plan import Plan, Progress, render

if TYPE_CHECKING:
    from m2gen.bench import Measurement


@dataclass(frozen=True)
class BenchRow:
    """One workload of one layer: how long it takes, and the schedule that it ran by."""

    layer: str
    measurement: Measurement
    choice: Choice


def bench(planned: Plan, layer: str | None, progress: Progress) -> list[BenchRow]:
    """Time every variant on its layer's workloads on the GPU; raises UsageError where there is none."""
    device = detect()
    if device is None:
        raise UsageError("m2gen bench must run on a machine whose GPU torch can use, got none")
    import torch

    from m2gen.bench import measure

    folder = materialise(f"packages/{planned.origin.name}", render(planned).files)
    module = load_module(folder / "__init__.py", f"m2gen_package_{folder.name}")
    layers = planned.spec.layers
    if layer is not None and layer not in layers:
        raise UsageError(f"--layer must be among {', '.join(layers)}, got {layer!r}")
    jobs = [
        (name, built.variant, workload)
        for built in planned.variants
        for name in built.layers
        for workload in layers[name].workloads
        if layer in (None, name)
    ]
    progress.start("bench", len(jobs))
    results = []
    for name, variant, workload in jobs:
        measured = measure(module.m2rnn, variant, workload.batch, workload.seq, torch.device("cuda"))
        bucket = bucket_of(workload.batch, variant.total_heads, device.sm_count)
        (choice,) = (c for c in planned.serving(variant, device.arch) if bucket in c.buckets)
        results.append(BenchRow(name, measured, choice))
        progress.advance(f"{name} {variant.dtype} B{workload.batch} S{workload.seq}")
    progress.finish()
    return results
