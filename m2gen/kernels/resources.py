"""Resources of a compiled kernel, read from its binary (NVIDIA) or assembly (AMD)."""

from __future__ import annotations

import re
import struct
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from m2gen.device import Device
from m2gen.errors import CacheError, CompileError, os_errors_as


@dataclass(frozen=True)
class Resources:
    """Registers and memory that one compiled kernel takes."""

    registers: int
    """32-bit registers a thread."""
    spill_bytes: int
    """Local (scratch) memory a thread: spills and arrays that left the registers."""
    shared_bytes: int
    """Shared memory (LDS) a program."""
    code_bytes: int

    def limits(self, device: Device, warps: int) -> tuple[str, ...]:
        """Return why the kernel cannot launch on ``device``; empty when it can."""
        reasons = []
        if self.shared_bytes > device.shared_bytes:
            reasons.append(f"shared memory must be at most {device.shared_bytes} bytes, got {self.shared_bytes}")
        if self.registers > device.registers:
            reasons.append(f"registers must be at most {device.registers} a thread, got {self.registers}")
        used = self.registers * warps * device.warp_size
        if device.is_nvidia and used > device.register_file:
            reasons.append(f"registers must be at most {device.register_file} a program, got {used}")
        return tuple(reasons)


def resources_of(compiled: Any, device: Device) -> Resources:
    """Return what a kernel that Triton compiled takes; raises CompileError where its compiled form cannot be read."""
    return (_nvidia_resources if device.is_nvidia else _amd_resources)(compiled)


def _nvidia_resources(compiled: Any) -> Resources:
    cubin = compiled.asm["cubin"]
    with ExitStack() as stack:
        with os_errors_as(CacheError, "temporary files must be writable", "; TMPDIR may name a folder"):
            stream = stack.enter_context(NamedTemporaryFile(suffix=".cubin"))
            stream.write(cubin)
            stream.flush()
        command = [_cuobjdump(), "-res-usage", stream.name]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise CompileError(f"cuobjdump must report REG and STACK, got {text[-200:]!r}")
    return Resources(int(usage[1]), int(usage[2]), compiled.metadata.shared, len(machine_code(cubin)))


def _cuobjdump() -> str:
    import triton.backends.nvidia

    beside = Path(triton.backends.nvidia.__file__ or "").parent / "bin" / "cuobjdump"
    return str(beside) if beside.is_file() else "cuobjdump"


def machine_code(elf: bytes) -> bytes:
    """Return the executable sections of a 64-bit little-endian ELF file: instructions, without names or lines."""
    table, entry, count = struct.unpack_from("<Q", elf, 0x28)[0], *struct.unpack_from("<HH", elf, 0x3A)
    executable, code = 0x4, b""
    for index in range(count):
        _, _, flags, _, offset, size = struct.unpack_from("<IIQQQQ", elf, table + index * entry)
        code += elf[offset : offset + size] if flags & executable else b""
    return code


def binary_of(compiled: Any, device: Device) -> bytes:
    """Return the machine code of a kernel that Triton compiled."""
    return machine_code(compiled.asm["cubin" if device.is_nvidia else "hsaco"])


def _amd_resources(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]

    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        if found is None:
            raise CompileError(f"AMD assembly must state {pattern!r}")
        return int(found[1])

    spills = number(r"\.private_segment_fixed_size:\s*(\d+)")
    registers = number(r"\.vgpr_count:\s*(\d+)")
    return Resources(registers, spills, compiled.metadata.shared, len(machine_code(compiled.asm["hsaco"])))
