"""Which GPU this is, and what every known target allows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from m2gen.errors import UsageError, among


@dataclass(frozen=True)
class Device:
    """One kind of GPU: what a schedule may use of it and what a record is keyed by."""

    arch: str
    """``sm_90``, ``gfx942``; ``portable`` for kernels that assume no GPU in particular."""
    name: str
    """Product name, or the arch where no GPU was looked at."""
    sm_count: int
    """Streaming multiprocessors or compute units."""
    shared_bytes: int
    """Shared memory (LDS) that one program may use."""
    registers: int
    """32-bit registers that one thread may use."""
    register_file: int
    """32-bit registers that all threads of one program may use together."""
    warp_size: int = 32

    @property
    def is_nvidia(self) -> bool:
        return self.arch.startswith("sm_")

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")


def _nvidia(arch: str, sm_count: int, shared_kib: int) -> Device:
    return Device(arch, arch, sm_count, shared_kib * 1024, registers=255, register_file=65536)


def _amd(arch: str, cu_count: int) -> Device:
    return Device(arch, arch, cu_count, 64 * 1024, registers=512, register_file=4 * 65536, warp_size=64)


# Shared memory per block: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
# LDS and VGPRs: CDNA 2 and CDNA 3 instruction set references. SM counts are those of the usual product.
TARGETS: dict[str, Device] = {
    device.arch: device
    for device in (
        _nvidia("sm_80", 108, 163),
        _nvidia("sm_86", 84, 99),
        _nvidia("sm_89", 142, 99),
        _nvidia("sm_90", 132, 227),
        _nvidia("sm_100", 148, 227),
        _nvidia("sm_120", 188, 99),
        _amd("gfx90a", 104),
        _amd("gfx942", 304),
    )
}

PORTABLE = Device("portable", "portable", 100, 64 * 1024, registers=255, register_file=65536)
"""The least that every target has: serves the interpreter and GPUs that a spec does not list."""


def target(arch: str) -> Device:
    """Return the table's entry for ``arch``; raises ``UsageError`` for an unknown one."""
    if arch not in TARGETS:
        raise UsageError(f"--target must be {among(TARGETS)}, got {arch!r}")
    return TARGETS[arch]


def limits(arch: str) -> Device:
    """Return what ``arch`` allows; for one outside the table, the portable limits under its name."""
    return TARGETS.get(arch) or replace(PORTABLE, arch=arch, name=arch)


def detect() -> Device | None:
    """Return the current GPU, or None where torch sees none; an arch outside the table gets the portable limits."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    nvidia = f"sm_{properties.major}{properties.minor}"
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else nvidia
    return replace(limits(arch), name=properties.name, sm_count=properties.multi_processor_count)
