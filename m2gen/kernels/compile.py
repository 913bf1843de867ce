"""Source to module, and source to machine code for targets that need not be present, with the resources it takes."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from m2gen.cache import is_of_a_disk, key_of, materialise
from m2gen.device import Device
from m2gen.errors import CacheError, CompileError
from m2gen.kernels.arguments import Argument, arguments
from m2gen.kernels.lowering import Direction, Lowering
from m2gen.kernels.options import options_of
from m2gen.kernels.render import render_kernel
from m2gen.kernels.resources import Resources, resources_of

RESULT_VERSION = "1"
ASSEMBLER = ("PTXAS_OPTIONS", "DISABLE_PTXAS_OPT", "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
"""Triton's environment variables that choose the assembler and its options."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile for one target."""

    lowering: Lowering
    direction: Direction
    device: Device

    @property
    def name(self) -> str:
        return f"{self.lowering.variant.key} {self.direction} for {self.device.arch}"

    @property
    def source(self) -> str:
        return source_of(self.lowering)

    @property
    def options(self) -> dict[str, int]:
        return options_of(self.lowering, self.direction)

    @property
    def warps(self) -> int:
        return self.options["num_warps"]

    @property
    def key(self) -> str:
        described = repr(arguments(self.lowering, self.direction))
        parts = (RESULT_VERSION, toolchain(), self.device.arch, self.direction, str(self.options), described)
        return key_of(*parts, self.source)


@lru_cache(maxsize=64)
def source_of(lowering: Lowering) -> str:
    """Return the text that is compiled, which says nothing of where a schedule comes from."""
    return render_kernel(lowering)


def triton_version() -> str:
    """Return the version of Triton, whose wheel carries the assembler."""
    return metadata.version("triton")


def toolchain() -> str:
    """Name what turns source into machine code: Triton, and what the environment says of its assembler."""
    said = (f"{name}={os.environ[name]}" for name in ASSEMBLER if name in os.environ)
    return ", ".join((f"triton {triton_version()}", *said))


def load_module(path: Path, name: str) -> ModuleType:
    """Import a file, or the package whose ``__init__.py`` it is, under ``name``."""
    if name in sys.modules:
        return sys.modules[name]
    package = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=package)
    if spec is None or spec.loader is None:
        raise CompileError(f"{path.name} must be an importable file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def compile_kernel(job: Job) -> Resources:
    """Cross-compile one kernel in this process; raises CompileError with the compiler's first line."""
    return resources_of(compiled(job), job.device)


def compiled(job: Job) -> Any:
    """Return what Triton compiles one kernel to; raises CompileError with the compiler's first line.

    Raises CacheError where Triton cannot write what it compiled, which says nothing of the kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    module = load_kernels(job.source)
    kernel = getattr(module, f"m2rnn_{job.direction}_kernel")
    if isinstance(kernel, triton.runtime.Heuristics):
        kernel = kernel.fn
    described = arguments(job.lowering, job.direction)
    target = GPUTarget(*backend_of(job.device))
    source = _source(job.lowering)(kernel, *_specialisation(described))
    options: dict[str, Any] = dict(job.options)
    if job.direction is Direction.FORWARD and job.lowering.carries_zeros and target.backend == "cuda":
        options["ptx_options"] = module.forward_effort(target)
    try:
        return triton.compile(source, target=target, options=options)
    except Exception as error:  # whatever a compiler raises, the user needs the kernel's name
        told = telling(error)
        if is_of_a_disk(told):
            raise CacheError(f"Triton's cache must be writable: {told}; TRITON_CACHE_DIR may name a folder") from error
        raise CompileError(f"{job.name}: {type(told).__name__}: {_last_line(told)}") from error


def _source(k: Lowering) -> Any:
    """Return Triton's class of kernels to compile: Gluon's are not those that its compiler lays out itself."""
    if k.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def load_kernels(source: str) -> ModuleType:
    """Import the module that ``render.render_kernel`` returned the text of."""
    folder = materialise("sources", {"kernel.py": source})
    return load_module(folder / "kernel.py", f"m2gen_{folder.name}")


def backend_of(device: Device) -> tuple[str, int | str, int]:
    """Return what Triton calls a device: backend, arch and threads a warp."""
    return ("cuda", int(device.arch[3:]), 32) if device.is_nvidia else ("hip", device.arch, device.warp_size)


def telling(error: BaseException) -> BaseException:
    """Return the error that says what is wrong: of an inlined function's, Triton's end with a caret under the call."""
    while error.__cause__ is not None and str(error).endswith("^"):
        error = error.__cause__
    return error


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[-1]


def _specialisation(described: tuple[Argument, ...]) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Return what Triton calls signature, constants and attributes."""
    signature = {argument.name: argument.type for argument in described}
    constants = {(i,): a.value for i, a in enumerate(described) if a.type == "constexpr"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(described) if a.even}
    return signature, constants, attributes
