"""Compile every kernel of a layer's module for a target, in a process without the interpreter: a script."""

from __future__ import annotations

import inspect
import sys
from typing import Any

FLOAT32 = (
    "A_log", "dt_bias", "scratch", "r", "state", "f", "df", "parts", "dskip", "dnorm", "dweight", "dbias",
    "squares", "scale", "dsquares",
)  # fmt: skip
INT32 = ("ended", "place", "sequence", "indices", "out_indices")
FLAGS = {
    "WIDTH": 4, "SILU": True, "IS_VARLEN": True, "NORM": True, "ROUNDS": False, "NW": 1, "APPROXIMATE": False
}  # fmt: skip
NUMBERS = ("tokens", "slots", "steps", "chunks", "width", "size", "stride_", "forget", "output_gate")


def described(kernel: Any, dtype: str) -> tuple[dict[str, str], dict[tuple[int, ...], Any]]:
    """Return types and constants of a kernel whose operands are of ``dtype``, with everything that may be given."""
    types: dict[str, str] = {}
    for name in inspect.signature(kernel.fn).parameters:
        if name in FLAGS:
            types[name] = "constexpr"
        elif name == "eps":
            types[name] = "fp32"
        elif name.startswith(NUMBERS):
            types[name] = "i32"
        else:
            types[name] = "*i32" if name in INT32 else "*fp32" if name in FLOAT32 else f"*{dtype}"
    return types, {(i,): FLAGS[name] for i, name in enumerate(types) if name in FLAGS}


def main(rows: str, cols: str, heads: str, dtype: str, arch: str) -> None:
    """Print the name of each kernel that was compiled."""
    import triton
    from support import make_variant
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from m2gen.device import TARGETS
    from m2gen.kernels.compile import backend_of, load_kernels
    from m2gen.kernels.layer import layer_of, render_layer

    layer = layer_of(make_variant(int(rows), int(cols), tuple(map(int, heads.split(",")))))
    assert layer is not None
    module = load_kernels(render_layer(layer))
    for name in sorted(name for name in vars(module) if name.endswith("_kernel")):
        kernel = getattr(module, name)
        triton.compile(ASTSource(kernel, *described(kernel, dtype)), target=GPUTarget(*backend_of(TARGETS[arch])))
        print(name)


if __name__ == "__main__":
    main(*sys.argv[1:])
