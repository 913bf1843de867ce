"""Kernels compiled for a GPU that need not be there: a launch ends where Triton would call the GPU's driver."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

_NVIDIA = re.compile(r"sm_([7-9][0-9]|1[0-9]{2})")
"""Compute capabilities from 7.0, the first that Triton compiles for; of others each kernel would fail by itself."""
_AMD = re.compile(r"gfx(9|1[0-9])[0-9a-f]{2}")
"""Generation, then a digit each for the chip and its stepping."""


class Target(NamedTuple):
    """A GPU by what Triton's compiler is told of it."""

    backend: str
    arch: int | str
    warp_size: int


def target_of(arch: str) -> Target:
    """Return the target of an arch such as ``sm_90`` or ``gfx942``; raises ValueError for what is neither."""
    if found := _NVIDIA.fullmatch(arch):
        return Target("cuda", int(found[1]), 32)
    if _AMD.fullmatch(arch):
        return Target("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ValueError(f"arch must be one such as sm_90 or gfx942, got {arch!r}")


class AbsentDriver:
    """A driver for Triton that has the target of a GPU and nothing else of it."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget(*self._target)


def _every(function: Any) -> bool:
    return True


@contextmanager
def compiling(target: Target, seen: Callable[[Any], None], wanted: Callable[[Any], bool] = _every) -> Iterator[None]:
    """Within the context, a launch compiles the kernel of a ``wanted`` function, hands it to ``seen``, and ends.

    It returns nothing, as in the interpreter, so that nobody keeps the kernel to launch it again. Triton goes the way
    of a launch up to the driver, so the kernel in its cache is the one that a launch on such a GPU looks for. Whatever
    else of the process uses Triton has no GPU thereafter: it is for processes of their own.
    """
    function = importlib.import_module("triton.runtime.jit").JITFunction
    launch = function.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if wanted(self):
            seen(launch(self, *arguments, grid=grid, warmup=True, **options))

    importlib.import_module("triton.runtime").driver.set_active(AbsentDriver(target))
    function.run = compile_only
    try:
        yield
    finally:
        function.run = launch
