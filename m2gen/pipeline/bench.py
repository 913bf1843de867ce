"""Time a plan's package on the GPU at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m2gen.cache import materialise
from m2gen.compile import load_module
from m2gen.device import detect
from m2gen.errors import UsageError
from m2gen.pipeline.plan import Plan, Progress, render

if TYPE_CHECKING:
    from m2gen.bench import Measurement


def bench(planned: Plan, layer: str | None, progress: Progress) -> list[tuple[str, Measurement]]:
    """Time every variant on its layer's workloads on the GPU; raises UsageError where there is none."""
    if detect() is None:
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
        results.append((name, measure(module.m2rnn, variant, workload.batch, workload.seq, torch.device("cuda"))))
        progress.advance(f"{name} {variant.dtype} B{workload.batch} S{workload.seq}")
    progress.finish()
    return results
