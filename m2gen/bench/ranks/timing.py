"""Time steps over ranks, and the collectives that they call by themselves."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, distributed

from m2gen.bench.ranks.check import DTYPES
from m2gen.bench.ranks.entries import Shape

WARM_UPS = 2
IN_A_ROW = 4
"""Calls of a sample on a GPU, so that the host is ahead of it as in training."""
SECONDS = 4.0
"""Longest that repeats of one measurement take, if more than ``FEWEST`` of them do."""
FEWEST = 5
PROBE_BYTES = 1 << 26
"""Bytes that a GPU sends to measure the link; a CPU sends a thousandth."""
COLLECTIVES = tuple(
    name
    for names in (
        ("all_reduce",),
        ("all_gather_single", "all_gather_into_tensor"),
        ("reduce_scatter_single", "reduce_scatter_tensor"),
        ("all_to_all_single",),
        ("batch_isend_irecv",),
    )
    for name in names
    if hasattr(distributed, name)
)
"""What packages call, collectives and batches of messages, by the names that versions of torch have for them."""


@dataclass(frozen=True)
class Collective:
    """One call of a collective, or of messages, with tensors of the sizes that it had."""

    name: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    def call(self) -> None:
        """Do it again, on whatever the tensors hold."""
        works = getattr(distributed, self.name)(*self.arguments, **self.options)
        for work in works or ():
            work.wait()

    @property
    def messages(self) -> list[distributed.P2POp]:
        """Messages to and from single ranks; none of a collective."""
        return [x for given in self.arguments if isinstance(given, list) for x in given]

    @property
    def sent_bytes(self) -> int:
        """Bytes that a rank sends, at the least."""
        if self.messages:
            return sum(_size(x.tensor) for x in self.messages if x.op is distributed.isend)
        ranks = distributed.get_world_size(self.options.get("group"))
        tensors = (x for x in (*self.arguments, *self.options.values()) if isinstance(x, Tensor))
        most = max(map(_size, tensors))
        rounds = 2 if self.name == "all_reduce" else 1
        return rounds * most * (ranks - 1) // ranks


def repeat(calls: Iterable[Collective]) -> None:
    """Do collectives again, one after the other."""
    for call in calls:
        call.call()


@contextmanager
def recorded() -> Iterator[list[Collective]]:
    """Note the collectives that are called, from whatever module, until the end."""
    calls: list[Collective] = []
    plain = {name: getattr(distributed, name) for name in COLLECTIVES}

    def noting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            again = {key: _apart(x) for key, x in options.items() if key != "async_op"}
            calls.append(Collective(name, tuple(map(_apart, args)), again))
            return plain[name](*args, **options)

        return call

    for name in COLLECTIVES:
        setattr(distributed, name, noting(name))
    try:
        yield calls
    finally:
        for name, call in plain.items():
            setattr(distributed, name, call)


def _apart(x: Any) -> Any:
    """Return room of a tensor's size, or messages of as much, and anything else as it is."""
    if isinstance(x, list):
        return [distributed.P2POp(y.op, _apart(y.tensor), group=y.group, group_peer=y.group_peer) for y in x]
    return torch.empty_like(x) if isinstance(x, Tensor) else x


def _size(x: Tensor) -> int:
    """Return a tensor's bytes."""
    return x.numel() * x.element_size()


def together(device: torch.device) -> None:
    """Wait until every rank is here, and its GPU has nothing to do."""
    distributed.all_reduce(torch.zeros(1, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize()


def slowest_ms(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median of the milliseconds of a call, of each repeat the slowest rank's.

    Long calls are repeated less often, at least ``FEWEST`` times or what is asked for.
    """
    for _ in range(WARM_UPS):
        run()
    first = _slowest([_once(run, device)], device)[0]
    enough = int(SECONDS * 1e3 / max(first, 1e-3) / IN_A_ROW)
    fewer = min(repeats, max(FEWEST, enough))
    return float(median(_slowest([_once(run, device) for _ in range(fewer)], device)))


def captured(step: Callable[[], None], device: torch.device) -> tuple[Callable[[], None] | None, str]:
    """Return what replays a step from a CUDA graph, collectives and all, or why there is none: on all ranks the same.

    Threads of the backend may ask about its own work meanwhile, so that only this one's calls are held to be captured.
    """
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    graph, why = torch.cuda.CUDAGraph(), ""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    together(device)
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        why = str(error).splitlines()[0]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, why)
    why = next(filter(None, found), "")
    return (None, why) if why else (graph.replay, "")


def _slowest(milliseconds: list[float], device: torch.device) -> list[float]:
    """Return the largest of the ranks' numbers, place by place: the same on every rank."""
    samples = torch.tensor(milliseconds, dtype=torch.float64, device=device)
    distributed.all_reduce(samples, op=distributed.ReduceOp.MAX)
    found: list[float] = samples.tolist()
    return found


def _once(run: Callable[[], object], device: torch.device) -> float:
    together(device)
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(IN_A_ROW):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / IN_A_ROW


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the most memory that a call has allocated on any rank, with what was there before; 0 on CPUs."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    found = torch.tensor([torch.cuda.max_memory_allocated()], dtype=torch.int64, device=device)
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return int(found.item())


def recurrence_of(package: Any, shape: Shape, batch: int, seq: int, device: torch.device) -> Callable[[], None]:
    """Return a call of forward and backward of the recurrence with a layer's heads."""
    made: dict[str, Any] = {"device": device, "dtype": DTYPES[shape.dtype]}
    backend = "kernels" if device.type == "cuda" else "reference"
    layer = package.M2RNN(1, shape.state_expansion, shape.head_dim, shape.heads, backend=backend, **made)
    scan = importlib.import_module(f"{package.__name__}.scan")
    heads, rows, cols = shape.heads, shape.state_expansion, shape.head_dim
    sizes = ((heads["q"], rows), (heads["k"], rows), (heads["v"], cols), (heads["f"],))
    operands = [torch.randn(batch, seq, *size, **made).requires_grad_() for size in sizes]
    dy = torch.randn(batch, seq, layer.total_heads, cols, **made)

    def run() -> None:
        q, k, v, x = operands
        forget, A_log, dt_bias = scan.gate_of(layer, x, q.dtype)
        options = {"A_log": A_log, "dt_bias": dt_bias, "backend": backend, "output_final_state": False}
        y, _ = package.m2rnn(q, k, v, layer.state_weight, forget, **options)
        torch.autograd.grad(y, [*operands, layer.state_weight], dy)

    return run


def link(device: torch.device, repeats: int) -> tuple[float, float]:
    """Return 10^9 bytes a second that each rank sends in a large exchange, and the milliseconds of a small sum."""
    ranks = distributed.get_world_size()
    size = (PROBE_BYTES if device.type == "cuda" else PROBE_BYTES >> 10) // ranks * ranks
    one, other = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    many = slowest_ms(lambda: distributed.all_to_all_single(one, other), device, repeats)
    small = torch.zeros(1, device=device)
    few = slowest_ms(lambda: [distributed.all_reduce(small) for _ in range(10)], device, repeats) / 10
    return size * (ranks - 1) / ranks / many / 1e6, few
