"""The layer's kernels for targets that are not here: the interpreter takes what a compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support import ROOT

KERNELS = {
    f"m2rnn_{name}_kernel"
    for name in (
        "convolve",
        "convolve_backward",
        "decay",
        "decay_backward",
        "decode",
        "finish",
        "finish_backward",
        "scale",
        "scale_backward",
    )
}
LAYERS = {
    "one query head": ("64", "16", "1,1,132,132,132", "bf16", "sm_90"),
    "heads apart": ("64", "64", "8,8,8,8,8", "bf16", "gfx942"),
    "odd dims": ("9", "9", "7,7,7,7,7", "fp16", "sm_100"),
    "many rows": ("256", "16", "2,1,4,2,4", "fp32", "sm_80"),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_every_kernel_compiles(layer: tuple[str, ...]) -> None:
    """Types of variables, layouts and sizes of tiles hold for every kernel of a module, to machine code."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "fakes"), env.get("PYTHONPATH", "")))
    script = ROOT / "tests" / "fakes" / "layer_compiler.py"
    done = subprocess.run([sys.executable, str(script), *layer], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stdout.split()) == KERNELS
