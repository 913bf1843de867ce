"""How long a generated operator takes, and how much memory it needs beyond its inputs, on the GPU at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from m2gen.problem import Problem, make_inputs
from m2gen.variant import Variant
from m2gen.verify import OPERANDS, Operator


@dataclass(frozen=True)
class Measurement:
    """Medians of one variant on one workload."""

    variant: str
    batch: int
    seq: int
    forward_ms: float
    """Without gradients: nothing is saved."""
    step_ms: float
    """Forward that saves checkpoints, and backward."""
    extra_bytes: int
    """Peak allocation during a step beyond inputs and their gradients' sources."""


def measure(operator: Operator, variant: Variant, batch: int, seq: int, device: torch.device) -> Measurement:
    """Time ``operator`` by CUDA events after warm-up, with the L2 cache flushed between runs."""
    from triton.testing import do_bench

    inputs = make_inputs(variant, Problem(batch, seq), seed=0).to(device)
    leaves = [getattr(inputs, name).requires_grad_() for name in OPERANDS[:5]]

    def forward() -> Any:
        with torch.no_grad():
            return operator(*leaves)

    def step() -> Any:
        y, _ = operator(*leaves)
        return torch.autograd.grad(y, leaves, inputs.dy)

    step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    extra = torch.cuda.max_memory_allocated(device) - before
    forward_ms = do_bench(forward, warmup=25, rep=200, return_mode="median")
    step_ms = do_bench(step, warmup=25, rep=300, return_mode="median")
    return Measurement(variant.key, batch, seq, forward_ms, step_ms, extra)
