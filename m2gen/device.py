"""The GPU at hand, and the limits of every known target."""

from __future__ import annotations

from dataclasses import dataclass, replace

from m2gen.errors import UsageError, among


@dataclass(frozen=True)
class Device:
    """One kind of GPU: its limits for schedules, and the name that records are keyed by."""

    arch: str
    """``sm_90`` or ``gfx942``, say; ``portable`` for kernels that assume no particular GPU."""
    name: str
    """Product name, or the arch if no GPU was detected."""
    sm_count: int
    """Streaming multiprocessors or compute units."""
    shared_bytes: int
    """Maximum shared memory (LDS) per program, in bytes."""
    registers: int
    """Maximum 32-bit registers per thread."""
    register_file: int
    """Maximum 32-bit registers of all threads of one program together."""
    warp_size: int = 32

    @property
    def is_nvidia(self) -> bool:
        return self.arch.startswith("sm_")

    @property
    def has_xorsign(self) -> bool:
        """Whether one instruction takes the smaller size with the signs of both (PTX ISA: ``.xorsign``, from sm_86)."""
        number = self.arch.removeprefix("sm_").rstrip("af")  # sm_90a and sm_100f are parts of what others run, too
        return self.is_nvidia and number.isdecimal() and int(number) >= 86


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
"""Limits that every target meets: for the interpreter, and for GPUs that a spec does not list."""


def target(arch: str) -> Device:
    """Return the entry of ``TARGETS`` for ``arch``; raises UsageError for an unknown one."""
    if arch not in TARGETS:
        raise UsageError(f"--target must be {among(TARGETS)}, got {arch!r}")
    return TARGETS[arch]


def limits(arch: str) -> Device:
    """Return the limits of ``arch``; for one outside ``TARGETS``, the portable limits under its name."""
    return TARGETS.get(arch) or replace(PORTABLE, arch=arch, name=arch)


def detect() -> Device | None:
    """Return the current GPU, or None if torch sees none. An arch outside ``TARGETS`` gets the portable limits."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    nvidia = f"sm_{properties.major}{properties.minor}"
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else nvidia
    return replace(limits(arch), name=properties.name, sm_count=properties.multi_processor_count)
