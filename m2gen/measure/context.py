"""The context of measurements: the GPU at hand, its toolchain and the worker that uses it."""

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
from m2gen.measure import nvml


@dataclass(frozen=True)
class Context:
    """A GPU, its environment as records state it, and the worker that uses it."""

    device: Device
    environment: Environment
    gpu: str
    """Name of the GPU, which one tuner or benchmark may use at a time."""
    worker: str
    """Name of the worker: its host and GPU."""


def this_context(command: str) -> Context:
    """Return the context of the GPU at hand; raises UsageError if torch can use none."""
    device = detect()
    if device is None:
        raise UsageError(f"{command} must run on a machine whose GPU torch can use, got none")
    gpu = gpu_name()
    return Context(device, environment(device), gpu, worker_name(gpu))


def worker_name(gpu: str) -> str:
    """Return the name of this host with a GPU, as records may have it, whatever the host is called."""
    return re.sub(r"[^ -~]", "_", f"{platform.node()}:{gpu}")[:100]


def environment(device: Device) -> Environment:
    """Return the environment of this process; facts that cannot be found out are empty."""
    return Environment(
        device.arch,
        recorded_name(device),
        device.sm_count,
        driver(),
        installed("torch"),
        installed("triton"),
        _ptxas(device),
    )


def recorded_name(device: Device) -> str:
    """Return the product name of a GPU as records have it."""
    return re.sub(r"[^ -.0-~]", "_", device.name)[:80]


def installed(package: str) -> str:
    """Return the version of an installed package, or an empty string."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def driver() -> str:
    """Return the version of the GPU's driver; for AMD GPUs, whose driver is in the kernel, that of ROCm."""
    import torch

    if torch.version.hip:
        return str(torch.version.hip)[:100]
    return nvml.driver()


def _ptxas(device: Device) -> str:
    """Return the version of the ptxas in Triton's wheel."""
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


def gpu_name(index: int | None = None) -> str:
    """Return a name of a GPU, that which torch uses if None: its UUID, or its index."""
    import torch

    index = torch.cuda.current_device() if index is None else index
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return f"gpu-{uuid}" if uuid else f"gpu-{os.environ.get('CUDA_VISIBLE_DEVICES', '')}-{index}".replace(",", "-")
