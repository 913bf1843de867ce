"""Capture an entry's calls on the inputs of its workload once, and time their replays."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from m2gen.bench.entries import BenchWorkload, Entry, TimerResult
from m2gen.bench.kinds import Call
from m2gen.bench.operators import sequence_operator
from m2gen.bench.serving import served
from m2gen.measure.clock import Clock, Replay, aside, peak_bytes
from m2gen.problem import Inputs, Problem, make_inputs, packed_problem
from m2gen.verify import Case, Operator
from m2gen.verify.oracle import OPERANDS, call, gate_of, named_operands

FEWEST, MOST = 3, 10
"""Bounds on the number of samples in one round."""
CALLS = 200
"""Calls in one timing of the host: few enough for the driver's queue, which holds about a thousand."""
TIMINGS = 20
WARM_UPS = 2
"""Number of calls before the capture; the first compiles."""


def captured(entry: Entry, device: torch.device) -> Clock:
    """Capture an entry's calls: forward, and for sequences of training a forward that saves and its backward."""
    workload, implementation = entry.timed, entry.implementation
    inputs = _inputs(workload, device)
    if workload.call is not Call.SEQUENCE:
        run = served(implementation, workload, inputs)
        for _ in range(WARM_UPS):
            aside(run)
        extra_bytes = peak_bytes(run)
        return Clock([Replay(run)], extra_bytes)
    training = _Training(sequence_operator(implementation, workload.variant), inputs)
    for _ in range(WARM_UPS):
        aside(training.forward)
        aside(training.both)
    extra_bytes = peak_bytes(training.both)
    return Clock(training.captured(), extra_bytes)


def sampled(clock: Clock) -> TimerResult:
    """Sample an entry for one round."""
    calls = clock.sample(FEWEST, MOST)
    return TimerResult(tuple(call[0] for call in calls), tuple(call[1] + call[2] for call in calls if call[1:]))


class _Training:
    """An operator on leaves that require gradients."""

    def __init__(self, operator: Operator, inputs: Inputs) -> None:
        self._operator, self._inputs = operator, inputs
        self._leaves = {name: x.detach().requires_grad_() for name, x in named_operands(inputs).items()}
        self._case = Case("timed", Problem(*inputs.q.shape[:2]))  # of which a call takes the bound alone

    def forward(self) -> tuple[Tensor, Tensor]:
        """Run forward without gradients, which saves nothing."""
        with torch.no_grad():
            return self.saving()

    def saving(self) -> tuple[Tensor, Tensor]:
        """Run forward and save what the backward needs."""
        return call(self._operator, self._leaves, self._inputs, self._case)

    def backward(self, y: Tensor) -> Any:
        """Return the gradients of every operand; y cannot be differentiated again."""
        return torch.autograd.grad(y, list(self._leaves.values()), self._inputs.dy)

    def both(self) -> Any:
        """Run forward and backward."""
        y, state = self.saving()
        return y, state, self.backward(y)

    def captured(self) -> list[Replay[Any]]:
        """Return graphs of the forward without gradients, of the one that saves, and of the backward."""
        forward, saving = Replay(self.forward), Replay(self.saving)
        y, state = saving.results
        saving.results = (y.detach(), state.detach())
        return [forward, saving, Replay(partial(self.backward, y))]


@lru_cache(maxsize=1)
def _inputs(workload: BenchWorkload, device: torch.device) -> Inputs:
    return _drawn(workload, device)


def _drawn(workload: BenchWorkload, device: torch.device) -> Inputs:
    """Return inputs of the workload's size, for decoding with states of its dtype."""
    from_states = workload.call is not Call.SEQUENCE
    problem = Problem(workload.batch, workload.seq)
    if workload.packed:
        problem = packed_problem(workload.batch, workload.seq)
    problem = replace(problem, initial_state=from_states)
    inputs = make_inputs(workload.variant, problem, seed=0).to(device)
    if not workload.call.narrow_state or inputs.initial_state is None:
        return inputs
    return replace(inputs, initial_state=inputs.initial_state.bfloat16())


def host_us(entry: Entry, device: torch.device) -> float | None:
    """Return the host's microseconds for a call with one step, or a token and its drafts, of one sequence.

    It is the least of ``TIMINGS``, as timeit advises: whatever else the host does only adds to it. None if the
    implementation is not generated.
    """
    asked, implementation = entry.workload, entry.implementation
    call = asked.call
    workload = replace(asked, batch=1, seq=asked.seq if call.drafts else 1, packed=call.prefills)
    if not implementation.kind.generated:
        return None
    inputs = _drawn(workload, device)
    run: Callable[[], Any]
    if call is not Call.SEQUENCE:
        run = served(implementation, workload, inputs)
    else:
        operands = (getattr(inputs, name) for name in OPERANDS)
        run = partial(sequence_operator(implementation, workload.variant), *operands, **gate_of(inputs))
    count = -(-CALLS // 4) if call.prefills or call.drafts else CALLS  # these launch several kernels each
    times = []
    for _ in range(TIMINGS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(count):
                run()
        times.append((time.perf_counter() - start) / count * 1e6)
    return min(times)
