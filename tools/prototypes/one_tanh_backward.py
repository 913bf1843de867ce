"""A backward that evaluates tanh once, beside float64 and on the clock: a prototype for the mma family.

    python tools/prototypes/one_tanh_backward.py             # checks every gradient, then times the 7B and 410M layers
    python tools/prototypes/one_tanh_backward.py --compile   # for sm_90 without a GPU: registers, shared memory, spills

K = 64, V = 16, bf16, q and k of one head, S a multiple of 8, carry clip, no packed batches. Two warps have a head: the
states, slopes u (1 - Z^2) and gaps H - Z of 8 steps lie in shared memory as bf16; every sum over steps is a product
with a one-hot slot a step; the next 8 steps are copied by cp.async; dv is summed over the warps and written once.
What was measured, and what did not help, is in docs/history/10-one-tanh.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType

import jinja2
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

HERE = Path(__file__).parent
K, V, STEPS, WARPS = 64, 16, 8, 2
TYPES = {
    **dict.fromkeys(("q", "k", "v", "w", "f", "dy"), "*bf16"), "ckpt": "*fp16", "dh": "*fp32", "dq": "*fp32",
    "dk": "*fp32", "dv": "*bf16", "dw": "*fp32", "df": "*fp32", "dh0": "*fp32", "S": "i32", "bound": "fp32",
    "N": "constexpr",
}  # fmt: skip


def kernels() -> ModuleType:
    """Render the kernel and import it."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True)
    path = Path(tempfile.mkdtemp()) / "one_tanh_backward.py"
    path.write_text(environment.get_template("one_tanh_backward.py.j2").render(), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled() -> None:
    """Print what the kernel takes of sm_90."""
    attrs = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(TYPES.values()) if kind.startswith("*")}
    source = GluonASTSource(kernels().backward_kernel, TYPES, {(len(TYPES) - 1,): 132}, attrs)
    found = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": WARPS, "num_stages": 1})
    print(f"shared memory {found.metadata.shared} bytes, code {len(found.asm['cubin'])} bytes")


def states_of(k: Tensor, v: Tensor, w: Tensor, f: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return H_0 to H_S, (B, N, K, V) each, and Z_1 to Z_S."""
    h = k.new_zeros(f.shape[0], f.shape[2], K, V)
    states, candidates = [h], []
    for t in range(f.shape[1]):
        gate = f[:, t, :, None, None]
        candidates.append(torch.tanh(states[-1] @ w + k[:, t, None, :, None] * v[:, t, :, None, :]))
        states.append(gate * states[-1] + (1 - gate) * candidates[-1])
    return states, candidates


def reference(operands: list[Tensor], bound: float) -> dict[str, Tensor]:
    """Return the gradients of docs/design.md, section 2, in float64."""
    q, k, v, w, f, dy, c = (x.double() for x in operands)
    states, candidates = states_of(k, v, w, f)
    dq, dk, dv, df, dw = (torch.zeros_like(x) for x in (q, k, v, f, w))
    for t in reversed(range(f.shape[1])):
        gate = f[:, t, :, None, None]
        g = c.clamp(-bound, bound) + q[:, t, None, :, None] * dy[:, t, :, None, :]
        d = (1 - gate) * g * (1 - candidates[t] ** 2)
        dq[:, t] = (states[t + 1] @ dy[:, t, :, :, None]).squeeze(-1).sum(1)
        dk[:, t] = (d @ v[:, t, :, :, None]).squeeze(-1).sum(1)
        dv[:, t] = (d.transpose(-1, -2) @ k[:, t, None, :, None]).squeeze(-1)
        df[:, t] = (g * (states[t] - candidates[t])).sum((-1, -2))
        dw += (states[t].transpose(-1, -2) @ d).sum(0)
        c = gate * g + d @ w.transpose(-1, -2)
    return {"dq": dq, "dk": dk, "dv": dv, "dw": dw, "df": df, "dh0": c}


def draw(batch: int, steps: int, heads: int) -> list[Tensor]:
    """Return q, k, v, W, f, dy in bf16 and the gradient of the final state in float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, steps, K), (batch, steps, K), (batch, steps, heads, V), (heads, V, V), (batch, steps, heads))
    q, k, v, noise, gate, dy = (torch.randn(s, generator=generator) for s in (*shapes, shapes[2]))
    operands = (q, k, v, torch.eye(V) + 0.075 * noise, torch.sigmoid(gate + 1), dy)
    dh = torch.randn(batch, heads, K, V, generator=generator)
    return [*(x.to("cuda", torch.bfloat16) for x in operands), dh.cuda()]


def outputs(operands: list[Tensor]) -> dict[str, Tensor]:
    """Return the buffers that the kernel writes; those that it adds to are zeros."""
    q, _, v, _, f, *_ = operands
    batch, _, heads = f.shape
    zeros = {name: q.new_zeros(q.shape, dtype=torch.float32) for name in ("dq", "dk")}
    return {
        **zeros,
        "dv": torch.full_like(v, float("nan")),
        "dw": q.new_empty(batch * heads * WARPS, V, V, dtype=torch.float32),
        "df": f.new_zeros(f.shape, dtype=torch.float32),
        "dh0": q.new_empty(batch, heads, K, V, dtype=torch.float32),
    }


def launch(module: ModuleType, operands: list[Tensor], checkpoints: Tensor, found: dict[str, Tensor]) -> None:
    """Run the kernel: a program for each head of each sequence."""
    batch, steps, heads = operands[4].shape
    *given, dh = operands
    module.backward_kernel[(batch * heads,)](
        *given, checkpoints, dh, *found.values(), steps, 1.0, heads, num_warps=WARPS, num_stages=1
    )


def check(module: ModuleType) -> None:
    """Print each gradient's relative error."""
    operands = draw(2, 128, 4)
    states, _ = states_of(*(x.double() for x in operands[1:5]))
    checkpoints = torch.stack(states[:-1:STEPS], 1).half()
    found = outputs(operands)
    launch(module, operands, checkpoints, found)
    found["dw"] = found["dw"].view(2, 4, WARPS, V, V).sum((0, 2))
    for name, exact in reference(operands, 1.0).items():
        print(f"{name} {((found[name].double() - exact).norm() / exact.norm()).item():.2e}", end="  ")
    print()


def main() -> None:
    """Check, then time."""
    module = kernels()
    print(torch.cuda.get_device_name(), "triton", triton.__version__, "torch", torch.__version__)
    check(module)
    for layer, batch, heads in (("7B, B4 S4096", 4, 132), ("410M, B8 S4096", 8, 84)):
        operands = draw(batch, 4096, heads)
        checkpoints = torch.randn(batch, 4096 // STEPS, heads, K, V, device="cuda").clamp(-1, 1).half()
        found = outputs(operands)
        ms = triton.testing.do_bench(
            lambda given=(operands, checkpoints, found): launch(module, *given),
            warmup=25,
            rep=200,
            return_mode="median",
        )
        print(f"{layer}: {ms:.3f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", action="store_true")
    compiled() if parser.parse_args().compile else main()
