"""Where measurements are made: the GPU at hand, what runs on it and who has it, as records state it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from m2gen.db import Environment
from m2gen.device import Device, detect
from m2gen.errors import UsageError

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Context:
    """A GPU, what a record says of it, and who has it."""

    device: Device
    environment: Environment
    gpu: str
    """Names the GPU, which one tuner or benchmark at a time may use."""
    worker: str
    """Names who measures."""


def this_context(command: str) -> Context:
    """Return that of the GPU at hand; raises UsageError where torch can use none."""
    device = detect()
    if device is None:
        raise UsageError(f"{command} must run on a machine whose GPU torch can use, got none")
    return Context(device, environment(device), gpu_name(), worker_name())


def environment(device: Device) -> Environment:
    """Return the environment of this process; empty facts where they cannot be found out."""
    name = re.sub(r"[^ -.0-~]", "_", device.name)[:80]
    return Environment(
        device.arch, name, device.sm_count, _driver(), _version("torch"), _version("triton"), _ptxas(device)
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    """Return the version of the GPU's driver; of an AMD GPU, which has it in the kernel, ROCm's."""
    import torch

    if torch.version.hip:
        return str(torch.version.hip)[:100]
    try:
        found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", NVIDIA_DRIVER.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return found[1] if found else ""


def _ptxas(device: Device) -> str:
    """Return the version of the assembler that Triton's wheel carries."""
    if not device.is_nvidia:
        return ""
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__file__ or "").parent / "bin" / "ptxas"
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    return found[1] if found else ""


def worker_name() -> str:
    """Name this host and the GPU that torch uses."""
    return f"{platform.node()}:{gpu_name()}"[:100]


def gpu_name() -> str:
    """Name the GPU that torch uses among all there are: by its UUID, else by its number."""
    import torch

    index = torch.cuda.current_device()
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return f"gpu-{uuid}" if uuid else f"gpu-{os.environ.get('CUDA_VISIBLE_DEVICES', '')}-{index}".replace(",", "-")
