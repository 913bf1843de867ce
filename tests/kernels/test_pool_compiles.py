"""Kernels on pools compile for GPUs that need not be here, and spill no registers on those of NVIDIA."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import pytest
from support import ROOT

from m2gen.device import TARGETS

COMPILE = """
import sys
from dataclasses import replace
from itertools import product
import triton
from triton.experimental.gluon._runtime import GluonASTSource
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from support import make_variant
from m2gen.device import TARGETS
from m2gen.kernels.compile import backend_of, load_kernels
from m2gen.kernels.pool import pool_of, render_pool
from m2gen.kernels.resources import resources_of

POINTERS = {
    "A_log": "*fp32", "dt_bias": "*fp32", "indices": "*i32", "out_indices": "*i64", "accepted": "*i32",
    "seed": "*i64", "has_state": "*i1", "state": "*fp32", "out": "*fp32", "checkpoints": "*fp16", "last": "*fp32",
    "cu_seqlens": "*i32",
}
EVERYTHING = {"STEPS": 4, "STEPS_PAD": 4, "EVERY": True, "APPROXIMATE": False}
ONE_TOKEN = {"STEPS": 1, "STEPS_PAD": 1, "EVERY": False, "A_log": None, "dt_bias": None, "accepted": None, "seed": None}
ONE_TOKEN |= {"APPROXIMATE": sys.argv[1].startswith("sm_")}
CALLS = [("steps", EVERYTHING), ("steps", ONE_TOKEN), ("gather", {}), ("scatter", {}), ("keep", {})]
device = TARGETS[sys.argv[1]]
for rows, cols, dtype, pool in ((64, 16, "bf16", "bf16"), (64, 64, "fp16", "fp16"), (128, 128, "bf16", "fp32")):
    k = pool_of(make_variant(rows, cols))
    explicit = k.parts == 1 and sys.argv[1].startswith("sm_")
    modules = [load_kernels(render_pool(k)), load_kernels(render_pool(replace(k, explicit=explicit)))]
    for module, (name, constants) in product(modules[: 1 + explicit], CALLS):
        kernel = getattr(module, f"m2rnn_{name}_kernel", None)
        if kernel is None:
            continue
        constants = constants | {x: 1 for x in kernel.arg_names if x in ("stride_h_j", "stride_q_d", "stride_k_d")}
        types = {"pool": "*" + pool, **{x: "*" + dtype for x in "qkvwxy"}, **POINTERS}
        types |= dict.fromkeys(constants, "constexpr")
        signature = {x: types.get(x, "i32") for x in kernel.arg_names}
        places = {(kernel.arg_names.index(x),): value for x, value in constants.items()}
        options = {"num_warps": module.LAUNCH["warps"]}
        if constants.get("STEPS") == 1 and module.LAUNCH["registers"]:
            options["maxnreg"] = module.LAUNCH["registers"]
        if module is not modules[0]:
            signature["seed"], places[(kernel.arg_names.index("seed"),)] = "constexpr", None
        source = ASTSource if module is modules[0] else GluonASTSource
        compiled = triton.compile(source(kernel, signature, places), GPUTarget(*backend_of(device)), options)
        print(rows, cols, name, resources_of(compiled, device).spill_bytes)
"""

SPILLING = {("3.6", "sm_80"): ["64 16 steps 8"]}
"""Kernels that spill by another ptxas than that of Triton 3.7.1."""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_kernels_on_pools_compile(arch: str, tmp_path) -> None:
    """Every kernel, for pools of every dtype, with everything that a call may have and with the least.

    The widest states spill on AMD's GPUs, which have no record of anything measured.
    """
    assert arch in TARGETS
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "fakes")))
    environment |= {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, arch], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    spilling = [line for line in lines if not line.endswith(" 0") and TARGETS[arch].is_nvidia]
    explicit = 4 * TARGETS[arch].is_nvidia  # tokens of two states that a program holds whole
    series = ".".join(metadata.version("triton").split(".")[:2])
    assert (len(lines), spilling) == (15 + explicit, SPILLING.get((series, arch), []))
