"""The tool that counts the instructions of loops: of text, and of kernels that it compiles."""

from __future__ import annotations

import os
import subprocess
import sys

from support import ROOT

from m2gen.kernels.compile import load_module

tool = load_module(ROOT / "tools" / "loop_instructions.py", "m2gen_test_loop_instructions")
TEXT = """
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   LDG.E R3, [R4.64] ;
.L_x_1:
        /*0020*/              @!P0 FFMA R3, R3, R3, R1 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/                   BRA `(.L_x_0) ;
.L_x_2:
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
"""


def test_loops_are_backward_branches() -> None:
    """An inner loop is within the outer one; a branch forward is none, nor is what a kernel's end is padded with."""
    assert list(tool.loops(TEXT)) == [["FFMA", "BRA"], ["LDG", "FFMA", "BRA", "BRA", "BRA"]]


def test_every_kernel_has_its_line() -> None:
    """As a person types it; the loop of the forward has a tanh for each element that a thread has of a step."""
    spec = str(ROOT / "specs" / "h200.yaml")
    command = [sys.executable, "tools/loop_instructions.py", spec, "odd", "portable_f16x1u1a_b16x1c1a_i2_ptx"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    kernels = [line.split(",")[0] for line in lines if not line.startswith(" ")]
    assert sorted(kernels) == ["backward", "forward", "step"]
    assert " 8 MUFU" in lines[1]  # 16 rows of 16 columns over 32 threads
