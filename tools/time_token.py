"""Time what a decoded token of a layer is made of, and products for few rows in place of torch's.

A token is two products of few rows with a kernel between them that moves the states. For the published layers and a
batch this times, in CUDA graphs with a cold L2: the products by torch, and by a kernel for few rows with several
tiles, each checked first; then all three in a row, with a copy of the states in the middle, by torch's products, by
those of the best tiles, and by these where each kernel is launched before the one ahead of it is done, and asks for its
weights or states before it waits for that (programmatic dependent launch, which wants sm_90).

    python -m tools.time_token 64       # needs a GPU
    python -m tools.time_token 64 16 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton import language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from m2gen.measure.clock import WARM_SECONDS, Replay, timed, warm

CALLS = 60
CACHE_LINE = 128
"""Bytes that a prefetch brings into the L2."""


@dataclass(frozen=True)
class Layer:
    """The sizes of a layer: its input, the input projection's rows, the output projection's columns, its states."""

    name: str
    hidden: int
    projected: int
    inner: int
    state: int
    """Elements of a sequence's states."""


LAYERS = (
    Layer("m2rnn_7b", 1536, 4496, 2112, 132 * 64 * 16),
    Layer("m2rnn_410m", 1024, 2912, 1344, 84 * 64 * 16),
)
"""The published ones, with rows of the projection up to a multiple of 16, as layers have them in memory."""


@dataclass(frozen=True)
class Tiles:
    """How the kernel for few rows divides a product."""

    columns: int
    depth: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.columns} columns, {self.depth} deep, {self.warps} warps, {self.stages} stages"


def tiles() -> Iterator[Tiles]:
    """Yield what is tried: one program a tile of columns, each of which reads all rows of x."""
    for columns, depth, warps in product((16, 32, 64), (64, 128, 256), (4, 8)):
        stages = min(6, (160 << 10) // (2 * depth * (columns + 64)))
        if stages >= 2 and (warps == 4 or columns == 64):
            yield Tiles(columns, depth, warps, stages)


@triton.jit
def few_rows_kernel(
    x, w, out, rows, hidden, columns, stride_x, stride_w, stride_out,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Put x w^T into out for one tile of w's rows.

    ``EARLY``: the kernel before may still run; the weights are asked for, and x is waited for. What comes after may
    start once all that came before is done, so that it may read states before it waits.
    """
    i, j, k = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    at_w = w + j.to(tl.int64)[None, :] * stride_w + k[:, None]
    at_x = x + i.to(tl.int64)[:, None] * stride_x + k[None, :]
    here_i, here_j = (i < rows)[:, None], (j < columns)[None, :]
    if EARLY:
        lines = tl.arange(0, LINES) * LINE
        at = tl.where(here_j.trans() & (lines < hidden)[None, :], w + j[:, None] * stride_w + lines[None, :], w)
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; // $0", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, hidden, DEPTH):
        left = k < hidden - start
        w_k = tl.load(at_w + start, mask=here_j & left[:, None], other=0.0)
        x_k = tl.load(at_x + start, mask=here_i & left[None, :], other=0.0)
        total = tl.dot(x_k, w_k, total)
    at_out = out + i.to(tl.int64)[:, None] * stride_out + j[None, :]
    tl.store(at_out, total.to(out.dtype.element_ty), mask=here_i & here_j)


@triton.jit
def move_kernel(p, state, o, size, inner, stride_p, EACH: tl.constexpr, EARLY: tl.constexpr):
    """Add a number of the projection to a part of the states, in place, and leave a number of o; states come first."""
    b, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    at = part * EACH + tl.arange(0, EACH)
    h = tl.load(state + b * size + at, mask=at < size)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    h += tl.load(p + b * stride_p + part).to(tl.float32)
    tl.store(state + b * size + at, h, mask=at < size)
    tl.store(o + b * inner + part, tl.sum(h, 0).to(o.dtype.element_ty))


def few_rows(x: Tensor, w: Tensor, out: Tensor, by: Tiles, *, early: bool = False) -> Tensor:
    """Put x w^T into out (B, P), of x (B, hidden) and w (P, hidden), and return it."""
    rows, hidden = x.shape
    line = CACHE_LINE // w.element_size()
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    few_rows_kernel[(triton.cdiv(w.shape[0], by.columns),)](
        x, w, out, rows, hidden, w.shape[0], x.stride(0), w.stride(0), out.stride(0),
        ROWS=max(16, triton.next_power_of_2(rows)), COLUMNS=by.columns, DEPTH=by.depth,
        LINES=triton.next_power_of_2(triton.cdiv(hidden, line)), LINE=line, EARLY=early,
        num_warps=by.warps, num_stages=by.stages, **options,
    )  # fmt: skip
    return out


def move(p: Tensor, state: Tensor, o: Tensor, *, early: bool = False) -> Tensor:
    """Move states (B, size) on by a projection, as a stand-in for the layer's own kernel, and return o (B, inner)."""
    batch, size = state.shape
    each = 8192
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    move_kernel[(triton.cdiv(size, each), batch)](
        p, state, o, size, o.shape[1], p.stride(0), EACH=each, EARLY=early, num_warps=8, **options
    )
    return o


class Operands:
    """Operands of one token of a batch, small enough that nothing overflows."""

    def __init__(self, layer: Layer, batch: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(device, dtype)

        self.x, self.w_in = normal(batch, layer.hidden), normal(layer.projected, layer.hidden)
        self.p = torch.empty(batch, layer.projected, dtype=dtype, device=device)
        self.o, self.w_out = normal(batch, layer.inner), normal(layer.hidden, layer.inner)
        self.y = torch.empty(batch, layer.hidden, dtype=dtype, device=device)
        self.state = torch.zeros(batch, layer.state, device=device)

    def products(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return x, w and out of both products, by name."""
        return {"in": (self.x, self.w_in, self.p), "out": (self.o, self.w_out, self.y)}

    def token(self, by: dict[str, Tiles] | None, *, early: bool = False) -> Tensor:
        """Compute a token: by torch's products without tiles."""
        if by is None:
            return F.linear(move(F.linear(self.x, self.w_in), self.state, self.o), self.w_out)
        p = few_rows(self.x, self.w_in, self.p, by["in"], early=early)
        return few_rows(move(p, self.state, self.o, early=early), self.w_out, self.y, by["out"], early=early)


def error_of(x: Tensor, w: Tensor, out: Tensor) -> float:
    """Return the relative error of a product."""
    exact = x.double() @ w.double().T
    return float((out.double() - exact).norm() / exact.norm())


def microseconds(run: Callable[[], object]) -> float:
    """Return the median time of a call as a CUDA graph, after the L2 was written over."""
    run()
    replays = [Replay(run)]
    warm(replays)
    return 1e3 * median(time for (time,) in timed(replays, CALLS))


def best_tiles(x: Tensor, w: Tensor, out: Tensor) -> tuple[float, Tiles]:
    """Return the shortest time of the kernel for few rows and its tiles; ends the program if one is wrong."""
    found = []
    for by in tiles():
        few_rows(x, w, out.fill_(float("nan")), by)
        if not error_of(x, w, out) < 4e-3:  # bfloat16 rounds by 2^-9 at most
            raise SystemExit(f"few rows by {by} must be within 4e-3 of float64, got {error_of(x, w, out):.2e}")
        found.append((microseconds(lambda by=by: few_rows(x, w, out, by)), by))  # type: ignore[misc]
    return min(found, key=lambda pair: pair[0])


def report(layer: Layer, operands: Operands) -> Iterator[str]:
    """Yield lines of a Markdown table of a layer's token."""
    batch, chosen = operands.x.shape[0], {}
    for name, (x, w, out) in operands.products().items():
        megabytes = w.numel() * w.element_size() / 1e6
        usual = microseconds(lambda x=x, w=w: F.linear(x, w))  # type: ignore[misc]
        shortest, chosen[name] = best_tiles(x, w, out)
        for how, time in (("torch", usual), (str(chosen[name]), shortest)):
            yield f"| {layer.name} | {batch} | {name} | {how} | {time:.1f} | {megabytes / time:.2f} |"
    moved = 2 * operands.state.numel() * 4 / 1e6
    alone = microseconds(lambda: move(operands.p, operands.state, operands.o))
    yield f"| {layer.name} | {batch} | states | a copy | {alone:.1f} | {moved / alone:.2f} |"
    total = moved + sum(w.numel() * w.element_size() for _, w, _ in operands.products().values()) / 1e6
    ways = {"torch": (None, False), "few rows": (chosen, False), "few rows, early": (chosen, True)}
    for how, (by, early) in ways.items():
        time = microseconds(lambda by=by, early=early: operands.token(by, early=early))  # type: ignore[misc]
        yield f"| {layer.name} | {batch} | token | {how} | {time:.1f} | {total / time:.2f} |"


def main() -> None:
    """Print the table of the batches on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batch", type=int, nargs="*", default=[64], help="sequences, at most 128")
    batches = parser.parse_args().batch
    if not torch.cuda.is_available():
        raise SystemExit("time_token: needs a GPU")
    if not all(0 < batch <= 128 for batch in batches):
        parser.error(f"batch must be from 1 to 128, got {', '.join(map(str, batches))}")
    device = torch.device("cuda")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {WARM_SECONDS} s warm"
    )
    print("\n| layer | batch | what | how | us | TB/s |\n| --- | --- | --- | --- | --- | --- |")
    for batch in batches:
        for layer in LAYERS:
            for line in report(layer, Operands(layer, batch, device)):
                print(line, flush=True)


if __name__ == "__main__":
    main()
