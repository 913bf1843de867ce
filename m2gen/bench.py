"""How long a generated operator takes, and how much memory it needs beyond its inputs, on the GPU at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from m2gen.problem import Inputs, Problem, make_inputs
from m2gen.variant import Variant
from m2gen.verify import GATE_PARAMETERS, OPERANDS, Operator

CALLS = 200
"""Calls that one timing of the host spans: few enough for the driver's queue, which holds about a thousand."""


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
    call_us: float
    """What a forward without gradients takes of the host: the time of a call that the GPU does not hold up."""


def measure(operator: Operator, variant: Variant, batch: int, seq: int, device: torch.device) -> Measurement:
    """Time ``operator`` by CUDA events after warm-up, with the L2 cache flushed between runs."""
    from triton.testing import do_bench

    inputs = make_inputs(variant, Problem(batch, seq), seed=0).to(device)
    leaves = {name: x.requires_grad_() for name, x in _operands(inputs).items()}
    forward = partial(_without_gradients, operator, leaves)

    def step() -> Any:
        y, _ = operator(**leaves)
        return torch.autograd.grad(y, list(leaves.values()), inputs.dy)

    step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    extra = torch.cuda.max_memory_allocated(device) - before
    forward_ms = do_bench(forward, warmup=25, rep=200, return_mode="median")
    step_ms = do_bench(step, warmup=25, rep=300, return_mode="median")
    one = _operands(make_inputs(variant, Problem(1, 1), seed=0).to(device))
    with torch.no_grad():
        call_us = host_us(partial(operator, **one), device)
    return Measurement(variant.key, batch, seq, forward_ms, step_ms, extra, call_us)


def _operands(inputs: Inputs) -> dict[str, Tensor]:
    every = {name: getattr(inputs, name) for name in (*OPERANDS[:5], *GATE_PARAMETERS)}
    return {name: x for name, x in every.items() if x is not None}


def _without_gradients(operator: Operator, operands: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return operator(**operands)


def host_us(call: Callable[[], Any], device: torch.device) -> float:
    """Return the microseconds that the host takes to enqueue ``call``, whose GPU work is less.

    The least of 20 timings, as timeit advises: whatever else the host does only adds to it.
    """
    times = []
    for _ in range(20):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return min(times)
