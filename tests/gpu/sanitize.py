"""A small matrix of calls under compute-sanitizer: memcheck for addresses, racecheck for shared memory.

    python tests/gpu/sanitize.py            # both tools; exit status 1 if either finds anything, or cannot run
    python tests/gpu/sanitize.py memcheck   # one of them
    python tests/gpu/sanitize.py racecheck mma masked   # on these entries of the matrix alone
    python tests/gpu/sanitize.py --calls    # the calls alone, without a tool; of the entries that follow, if any do

The calls run once without a tool first, which compiles the kernels into Triton's cache: a tool then only loads them.
All entries run at once, each in a process of its own.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from m2gen.problem import TORCH_DTYPE, Inputs, Problem, make_inputs
from m2gen.schedule import Family, Reduction, Scratch, Tanh, WarpgroupBackward, WarpgroupForward, Wgmma, parse
from m2gen.schedule.knobs import SHORTEST_SEGMENT
from m2gen.variant import Variant

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fakes"))

from calls import arguments, differentiate
from support import GATED_HEADS, as_mma, build_package, import_package, make_schedule, make_variant

TOOLS = {
    "memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # an allocation each, so that each has its own bounds
    "racecheck": {},
}
LIMIT = 200
"""Seconds a tool may take."""
CLEAN = "SUMMARY: 0 "
"""The last line of either tool if it found nothing."""


MATRIX = {
    "masked": (make_variant(9, 9, (2, 1, 4, 4, 2), "bf16"), make_schedule("atomic", interval=4, chunk=2)),
    "two_row_blocks": (make_variant(24, 17), make_schedule("atomic", interval=2, chunk=2)),
    "several_warps": (make_variant(32, 64, (1, 1, 2, 1, 2), "fp16"), make_schedule("atomic", interval=4, warps=4)),
    "mma": (
        make_variant(40, 16, (1, 1, 4, 2, 4), "bf16"),
        as_mma(make_schedule("atomic", interval=8, unroll=8, forward_rows=32, backward_rows=32), Scratch.SHARED),
    ),
    "mma_warps": (
        make_variant(32, 64, (1, 1, 2, 1, 2), "fp16"),
        as_mma(make_schedule("atomic", interval=4, unroll=4, warps=4), Scratch.SHARED),
    ),
    "mma_four_steps": (  # of states in the registers of one warp
        make_variant(32, 16, (1, 1, 2, 2, 2), "bf16"),
        as_mma(make_schedule("atomic", interval=8, unroll=4, chunk=4, forward_rows=32, backward_rows=32)),
    ),
    "warpgroups": (
        make_variant(96, 40, (1, 1, 2, 1, 2), "fp16"),
        Wgmma(WarpgroupForward(Reduction.ATOMIC), WarpgroupBackward(Reduction.ATOMIC), 4, Tanh.EXP),
    ),
    "warpgroups_of_eight_steps": (
        make_variant(96, 40, (1, 1, 2, 1, 2), "bf16", tanh="approx"),
        parse("wgmma_aa_i8_ptx"),
    ),
    "warps_apart": (
        make_variant(24, 16, (1, 1, 2, 2, 2), "bf16"),
        replace(as_mma(make_schedule("atomic", forward_rows=32, interval=8, warps=2)), segments=2),
    ),
    "slots": (
        make_variant(64, 16, (1, 1, 2, 2, 2), "bf16", tanh="approx"),
        parse("mma_f64x2u8at_b64x2c8at_i8_ptx"),
    ),
    "slots_across": (
        make_variant(32, 40, (1, 1, 2, 2, 2), "bf16", tanh="approx"),
        parse("mma_f16x4u8a_b16x4c8at_i8_ptx"),
    ),
    "slots_across_forwards": (  # dims that need no padding, of which operands come by cp.async
        make_variant(32, 64, (1, 1, 2, 2, 2), "bf16", tanh="approx"),
        parse("mma_f16x4u8at_b16x4c8at_i8_ptx"),
    ),
    "softplus": (make_variant(heads=GATED_HEADS, dtype="bf16", gate="softplus"), make_schedule("atomic")),
    "total": (make_variant(16, 24, (1, 2, 4, 4, 2), "fp16", "total"), make_schedule("atomic")),
    "tf32": (make_variant(32, 16, products="tf32"), make_schedule("atomic")),
}
PROBLEMS = {
    "padded": Problem(2, 7, initial_state=True),
    "long": Problem(2, 35),  # more tokens than those up to which y is summed without atomics
    "packed": Problem(0, 0, lengths=(0, 5, 0, 1, 8, 0), initial_state=True),
}
LAYERED = ("masked", "mma", "softplus")
"""Entries on which a layer runs, too: dims without a power of two, a gate that is given, and one that is computed."""
LAYER_PROBLEMS = {"dense": Problem(2, 35), "packed": Problem(0, 0, lengths=(0, 5, 0, 1, 8, 0))}
CUT = {"segments": Problem(2, SHORTEST_SEGMENT + 3, initial_state=True)}


def entries() -> list[str]:
    """Name the entries that this GPU can run: all of them on Hopper, which alone has products of warpgroups."""
    hopper = torch.cuda.get_device_capability() == (9, 0)
    return [name for name, (_, schedule) in MATRIX.items() if hopper or schedule.family is not Family.WGMMA]


def calls(name: str, folder: Path, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what to run for one entry: training steps of each kind, calls without gradients, steps of decoding."""
    variant, schedule = MATRIX[name]
    package = import_package(folder / name, build_package(f"sanitize_{name}", [variant], schedule))
    for problem, sizes in {**PROBLEMS, **(CUT if schedule.segments > 1 else {})}.items():
        inputs = make_inputs(variant, sizes, seed=0).to(device)
        for mode in (True, False):
            yield f"{name} {problem} {'deterministic' if mode else 'default'}", _training(package, inputs, mode)
        yield f"{name} {problem} without gradients", partial(package.m2rnn, **arguments(inputs))
    for dtype in (torch.float32, torch.bfloat16):
        yield f"{name} step on {dtype}", _decoding(package, variant, device, dtype)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield f"{name} pool of {dtype}", _serving(package, variant, device, dtype)
    if name in LAYERED:
        for width in (4, None):
            layer = _layer(package, variant, device, width)
            for kind, problem in LAYER_PROBLEMS.items():
                yield f"{name} layer {width} {kind}", _layer_training(layer, problem)
            for dtype in (torch.float32, torch.bfloat16):
                yield f"{name} layer {width} on a pool of {dtype}", _layer_serving(package, layer, dtype)
        yield f"{name} rows scaled", _scaling(package, layer)


def _layer(package: ModuleType, variant: Variant, device: torch.device, width: int | None) -> nn.Module:
    heads = {**dict(zip("qkvfw", variant.heads.counts, strict=True)), "g": variant.heads.total}
    options = {"state_expansion": variant.state_expansion, "head_dim": variant.head_dim, "conv_width": width}
    torch.manual_seed(0)
    return package.M2RNN(40, **options, heads=heads).to(device, TORCH_DTYPE[variant.dtype])


def _layer_training(layer: nn.Module, problem: Problem) -> Callable[[], object]:
    weight, lengths = layer.state_weight, problem.lengths or ()
    shape = (*problem.lead, 40)
    x = torch.randn(shape, device=weight.device, dtype=weight.dtype, requires_grad=True)
    offsets = torch.tensor((0, *lengths), device=x.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = {"cu_seqlens": offsets} if lengths else {}
    return lambda: torch.autograd.grad(layer(x, **packed).float().square().sum(), [x, *layer.parameters()])


def _layer_serving(package: ModuleType, layer: nn.Module, dtype: torch.dtype) -> Callable[[], object]:
    """Return prompts, tokens and drafts on slots; some requests have none, and one a slot that is not there."""
    pool = package.M2RNNPool.allocate(layer, 9, state_dtype=dtype)
    table = torch.tensor([[8, 0, 1], [-1] * 3, [3, -1, 99]], device=pool.state.device)
    x = torch.randn(3, 3, 40, device=pool.conv.device, dtype=pool.conv.dtype)

    @torch.no_grad()
    def call() -> object:
        pool.prefill(x, table[:, 0])
        pool.step(x[:, 0], table[:, 0], table[:, 1])
        return pool.steps(x, table, torch.ones_like(table[:, 0]))

    return call


def _serving(package: ModuleType, variant: Variant, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    inputs = make_inputs(variant, Problem(3, 4, initial_state=True), seed=0).to(device)
    operands = arguments(inputs, ("q", "k", "v", "forget", "weight", "A_log", "dt_bias"))
    pool = inputs.initial_state.to(dtype).repeat(3, 1, 1, 1)
    table = torch.tensor([[8, 0, 1, 2], [-1] * 4, [3, -1, 99, 4]], device=device)
    seed = None if dtype == torch.float32 else torch.tensor(7, device=device)

    def call() -> tuple[torch.Tensor, ...]:
        y, _ = package.m2rnn(**operands, pool=pool, indices=table[:, 0], rounding_seed=seed)
        accepted = torch.ones_like(table[:, 0])
        return y, *package.m2rnn_steps(**operands, pool=pool, indices=table, accepted=accepted, rounding_seed=seed)

    return call


def _scaling(package: ModuleType, layer: nn.Module) -> Callable[[], object]:
    """Return a call of the kernels that scale rows by a norm over several ranks, of which there are none here."""
    normed = importlib.import_module(f"{package.__name__}.parallel.normed")
    norm = normed.Normed(40, 1e-5, normed.dims_of(layer))
    weight = layer.state_weight
    x = torch.randn(9, 523, device=weight.device, dtype=weight.dtype, requires_grad=True)
    squares = x.detach().float().square().sum(-1, keepdim=True).requires_grad_()
    return lambda: torch.autograd.grad(normed.scaled(x, squares, norm).float().square().sum(), [x, squares])


def _training(package: ModuleType, inputs: Inputs, deterministic: bool) -> Callable[[], object]:
    return lambda: differentiate(package.m2rnn, inputs, deterministic=deterministic)


def _decoding(package: ModuleType, variant: Variant, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    inputs = make_inputs(variant, Problem(2, 1, initial_state=True), seed=0).to(device)
    token = {key: getattr(inputs, key)[:, 0] for key in ("q", "k", "v", "forget")}
    shared = arguments(inputs, ("weight", "A_log", "dt_bias"))
    assert inputs.initial_state is not None
    state = inputs.initial_state.to(dtype)
    return lambda: package.m2rnn_step(**token, **shared, state=state)


def run_calls(names: Iterable[str]) -> int:
    """Run entries of the matrix on the GPU; return how many calls ran."""
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for label, call in calls(name, Path(folder), torch.device("cuda")):
                call()
                torch.cuda.synchronize()
                print(f"  {label}", flush=True)
                count += 1
    return count


def compiled(names: Iterable[str]) -> bool:
    """Run every entry in a process of its own, all at once; return whether they all did."""
    running = {name: subprocess.Popen([sys.executable, __file__, "--calls", name]) for name in names}
    end, failed = time.monotonic() + LIMIT, []
    for name, process in running.items():
        try:
            status: int | str = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            status = f"none within {LIMIT} s"
        if status:
            failed.append(f"{name} (exit status {status})")
    if failed:
        print(f"sanitize: every entry must run without a tool first, got {', '.join(failed)}")
    return not failed


def checked(tool: str, names: Sequence[str]) -> str:
    """Run entries under a tool, all at once; return why it is not clean, by entry, or nothing."""
    with ThreadPoolExecutor(len(names)) as pool:
        found = pool.map(lambda name: check(tool, [sys.executable, __file__, "--calls", name]), names)
        return "; ".join(f"{name}: {problem}" for name, problem in zip(names, found, strict=True) if problem)


def check(tool: str, command: list[str]) -> str:
    """Run ``command`` under a tool; return why it is not clean, or nothing."""
    executable = shutil.which("compute-sanitizer")
    if executable is None:
        return "compute-sanitizer must be on the PATH: it comes with the CUDA toolkit"
    under = [executable, "--tool", tool, "--error-exitcode", "1", *command]
    try:
        done = subprocess.run(
            under, env=os.environ | TOOLS[tool], timeout=LIMIT, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"must end within {LIMIT} s"
    text = done.stdout + done.stderr
    if done.returncode == 0 and CLEAN in text:
        return ""
    return f"exit status {done.returncode}\n{text[-8000:]}"


def main(arguments: list[str]) -> int:
    """Run the calls, plainly and then under each tool; return the exit status."""
    only_calls = arguments[:1] == ["--calls"]
    tools = [] if only_calls else [name for name in arguments if name in TOOLS]
    chosen = [name for name in arguments[only_calls:] if name not in tools]
    if unknown := set(chosen) - set(MATRIX):
        expected = f"--calls or {' or '.join(TOOLS)}, and entries of the matrix: {', '.join(MATRIX)}"
        print(f"sanitize: arguments must be {expected}; got {', '.join(sorted(unknown))}")
        return 2
    if not torch.cuda.is_available():
        print("sanitize: needs a GPU that torch can use")
        return 1
    start = time.monotonic()
    names = chosen or entries()
    if only_calls:
        print(f"calls: {run_calls(names)} ran, {time.monotonic() - start:.0f} s")
        return 0
    if not compiled(names):
        return 1
    print(f"compiled, {time.monotonic() - start:.0f} s", flush=True)
    status = 0
    for tool in tools or TOOLS:
        start = time.monotonic()
        problem = checked(tool, names)
        print(f"{tool}: {problem or 'clean'}, {time.monotonic() - start:.0f} s", flush=True)
        status = 1 if problem else status
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
