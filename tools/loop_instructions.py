"""Count the instructions in each loop of a layer's kernels, from the machine code of ptxas; needs no GPU.

    python tools/loop_instructions.py specs/h200.yaml m2rnn_7b mma_f32x1u8a_b32x1c2a_i16_ptx

A loop is the code between a backward branch and its target. The count, divided by the schedule's steps per iteration,
is the number of instructions that one step of a program issues; inner loops are within outer ones.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile

import triton.backends.nvidia

from m2gen.device import target
from m2gen.errors import M2genError
from m2gen.kernels.compile import Job, compiled
from m2gen.kernels.lowering import Direction, Lowering
from m2gen.kernels.resources import resources_of
from m2gen.schedule import check, default, parse
from m2gen.spec import load_spec
from m2gen.variant import expand

LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_]+)(.*)")
SHOWN = 12


def disassembled(cubin: bytes) -> str:
    """Return a cubin's code as text."""
    tool = Path(triton.backends.nvidia.__file__ or "").parent / "bin" / "nvdisasm"
    with NamedTemporaryFile(suffix=".cubin") as stream:
        stream.write(cubin)
        stream.flush()
        return subprocess.run([str(tool), "-c", stream.name], capture_output=True, text=True, check=True).stdout


def loops(text: str) -> Iterator[list[str]]:
    """Yield the opcodes of every loop, in the order in which loops end."""
    places: dict[str, int] = {}
    found: list[str] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            places[label[1]] = len(found)
        elif instruction := INSTRUCTION.search(line):
            opcode, operands = instruction[1], instruction[2]
            found.append(opcode)
            to = re.search(r"\.L_x_\d+", operands) if opcode == "BRA" else None
            if to and to[0] in places and len(found) - places[to[0]] > 1:
                yield found[places[to[0]] :]


def main() -> None:
    """Print a line for each loop of each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("layer")
    parser.add_argument("schedule", nargs="?", default="default", help="as m2gen names it")
    parser.add_argument("--target", default="sm_90")
    given = parser.parse_args()
    device = target(given.target)
    if not device.is_nvidia:
        parser.error(f"--target must be of NVIDIA, whose machine code this reads, got {given.target!r}")
    spec = load_spec(given.spec)
    if given.layer not in spec.layers:
        parser.error(f"layer must be among {', '.join(spec.layers)}, got {given.layer!r}")
    variant = next(built.variant for built in expand(spec) if given.layer in built.layers)
    named = default(variant, device) if given.schedule == "default" else parse(given.schedule)
    schedule = check(variant, named, device)
    for direction in Direction:
        kernel = compiled(Job(Lowering(variant, schedule), direction, device))
        resources = resources_of(kernel, device)
        print(f"{direction}, {schedule.slug}: {resources.registers} registers, {resources.spill_bytes} bytes spilled")
        for opcodes in loops(disassembled(kernel.asm["cubin"])):
            most = ", ".join(f"{count} {opcode}" for opcode, count in Counter(opcodes).most_common(SHOWN))
            print(f"  {len(opcodes)} instructions: {most}")


if __name__ == "__main__":
    try:
        main()
    except M2genError as error:
        raise SystemExit(f"loop_instructions: {error}") from None
