"""Time a layer's calls, the memory that they need, and the kernels of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from m2gen.bench.layers.breakdown import KernelTime
from m2gen.bench.layers.entries import LayerResult, LayerWorkload
from m2gen.bench.layers.subject import LayerSubject
from m2gen.measure.clock import Clock, Direct, Replay, aside, peak_bytes

FEWEST, MOST = 3, 10
"""Bounds on the number of samples in one round."""
WARM_UPS = 3
"""Number of calls before any is measured; the first compiles, and may tune itself."""
PROFILED = 3
"""Steps of which the kernels are counted."""


@dataclass(frozen=True)
class LayerClock:
    """A layer's calls that can be timed, and what was measured with them."""

    clock: Clock
    traffic: int
    kernels: tuple[KernelTime, ...]
    uncaptured: str = ""
    """Why the step of a sequence is not timed as a CUDA graph, too."""

    def sample(self) -> LayerResult:
        """Sample the calls for one round."""
        calls = self.clock.sample(FEWEST, MOST)
        forward, step, captured = (tuple(call[i] for call in calls if call[i:]) for i in range(3))
        return LayerResult(forward, step, captured)


def prepared(subject: LayerSubject, workload: LayerWorkload, device: torch.device) -> LayerClock:
    """Return a layer's clock: of a token as a captured graph, of sequences as the host makes the calls and as one."""
    if workload.call.decodes:
        return _decoding(subject, workload, device)
    x, dy = (_drawn(workload, workload.seq, device, subject, seed).requires_grad_(seed == 0) for seed in (0, 1))
    forward, step = partial(_forward, subject, x), partial(_step, subject, x, dy)
    for _ in range(WARM_UPS):
        forward()
        step()
    extra, kernels = peak_bytes(step), kernels_of(step)
    captured, why = _captured(step)
    return LayerClock(Clock([Direct(forward), Direct(step), *captured], extra), 0, kernels, why)


def _captured(step: Callable[[], object]) -> tuple[list[Replay[object]], str]:
    """Return a step as a CUDA graph, which waits for no host, or none and why it cannot be captured."""
    try:
        aside(step)
        return [Replay(step)], ""
    except RuntimeError as error:
        torch.cuda.synchronize()
        return [], str(error).splitlines()[0]


def _drawn(workload: LayerWorkload, seq: int, device: torch.device, subject: LayerSubject, seed: int) -> Tensor:
    dtype = next(p.dtype for p in subject.module.parameters() if p.dim() > 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(workload.batch, seq, workload.hidden, generator=generator).to(device, dtype)


def _forward(subject: LayerSubject, x: Tensor) -> Tensor:
    with torch.no_grad():
        return subject.call(x)


def _step(subject: LayerSubject, x: Tensor, dy: Tensor) -> Any:
    """Return the gradients of x and of every parameter, which are tensors of their own."""
    return torch.autograd.grad(subject.call(x), [x, *subject.module.parameters()], dy)


def _decoding(subject: LayerSubject, workload: LayerWorkload, device: torch.device) -> LayerClock:
    assert subject.decoder is not None
    decoder, x = subject.decoder(workload.batch, workload.seq), _drawn(workload, 1, device, subject, 0)

    def token() -> Tensor:
        with torch.no_grad():
            return decoder.step(x)

    for _ in range(WARM_UPS):
        aside(token)
    extra = peak_bytes(token)
    replay = Replay(token)
    weights = sum(p.numel() * p.element_size() for p in subject.module.parameters())
    return LayerClock(Clock([replay], extra), weights + decoder.traffic(), kernels_of(token))


def kernels_of(run: Callable[[], object]) -> tuple[KernelTime, ...]:
    """Return the kernels and copies of a call by torch's profiler, the longest first."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events() or ():
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            found.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    each = (KernelTime(name, sum(ms) / PROFILED, len(ms) / PROFILED) for name, ms in found.items())
    return tuple(sorted(each, key=lambda kernel: -kernel.ms))
