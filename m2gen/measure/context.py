"""Where measurements are made: the GPU at hand, or one that tests simulate."""

from __future__ import annotations

from dataclasses import dataclass

from m2gen.db import Environment
from m2gen.device import Device, detect
from m2gen.errors import UsageError
from m2gen.measure.environment import environment, gpu_name, worker_name


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
