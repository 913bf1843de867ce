"""Compile kernels by the calls that launch them, as models make these, on tensors without memory."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import absent, built, compiled, dispatch, fused, launch_plan, layer_op, library
from .callers import BATCH, Caller, LayerCaller, OperatorCaller
from .scenes import Kernel, Scene
from .stubs import build_stub

LONG = 4096
"""Steps of a sequence that is no short one for any kernel."""
LENGTHS_AROUND = (fused.LEAST_TOKENS, fused.LEAST_TOKENS // (2 * BATCH))
"""Steps of sequences with whose tokens the layer lays its projection out, and with whose it does not."""
AROUND = {*built.LAYER_KERNELS.values(), *(name for table in built.LAYER_TUNED.values() for name in table.values())}
"""Modules of the kernels around recurrences."""
DIVISORS = (16, 8, 4, 2, 1)
"""Powers of two that a length is a multiple of, which decide which strides are multiples of 16."""


def compile_scene(scene: Scene, arch: str) -> list[Kernel]:
    """Compile the kernels of a scene for an arch into Triton's cache; return them.

    It is for a process of its own, which has no GPU thereafter.
    """
    kernels: dict[str, Kernel] = {}
    module = _module(scene.module)

    def seen(kernel: Any) -> None:
        build_stub(kernel)
        owner = _module_of(kernel.src.fn)
        kernels.setdefault(kernel.hash, Kernel(owner, kernel.metadata.name, kernel.hash, kernel.hash in _FOUND))

    def wanted(function: Any) -> bool:
        around = _module_of(function) in AROUND
        side = {"m2rnn_forward_kernel": "forward", "m2rnn_backward_kernel": "backward"}.get(function.__name__)
        return scene.side == "around" if around else side in (None, scene.side) and scene.side != "around"

    importlib.import_module("triton").knobs.compilation.listener = _listen
    torch.use_deterministic_algorithms(scene.deterministic)
    with absent.compiling(absent.target_of(arch), seen, wanted):
        for call in _calls(scene, module):
            with Launching(module, arch):
                call()
    return list(kernels.values())


def _module(name: str) -> ModuleType:
    """Return a module by its name within ``kernels``, and execute no other than those of its variant."""
    tables = built.KERNELS.items()
    arch, variant = next((arch, key) for arch, table in tables for key, names in table.items() if name in names)
    return next(module for module in dispatch.KERNELS[arch][variant] if compiled.name_of(module) == name)


def _module_of(function: Any) -> str:
    """Return the name within ``kernels`` of the module of a function that Triton compiles."""
    return str(function.fn.__module__).rpartition(".")[2]


_FOUND: set[str] = set()
"""Hashes of kernels that lay in Triton's cache when this process first looked."""


def _listen(*, metadata: Mapping[str, Any], cache_hit: bool, **_: Any) -> None:
    if cache_hit:
        _FOUND.add(metadata["hash"])


def loaded() -> Iterator[ModuleType]:
    """Yield the package's modules of kernels, some more than once."""
    for table in dispatch.KERNELS.values():
        for modules in table.values():
            yield from modules
    yield from dispatch.LAYER_KERNELS.values()
    for tuned in dispatch.LAYER_TUNED.values():
        yield from tuned.values()


def forget_paths() -> None:
    """Have kernels that are compiled from now on name no folder of this machine as that of their source.

    Debuggers' line tables have it, and the time at which a file of that name changed.
    """
    function = importlib.import_module("triton.runtime.jit").JITCallable
    root = Path(importlib.import_module("triton.runtime").__path__[0]).parent
    list(loaded())  # executes them, so that their functions are there
    for jitted in [x for x in gc.get_objects() if issubclass(type(x), function)]:
        code = jitted.fn.__code__
        path = Path(code.co_filename)
        place = f"triton/{path.relative_to(root)}" if path.is_relative_to(root) else f"{built.NAME}/kernels/{path.name}"
        jitted.fn.__code__ = code.replace(co_filename=f"/{place}")
        if hasattr(jitted, "file_name"):  # from Triton 3.8 on, a function keeps the name that its code had
            jitted.file_name = f"/{place}"


class Launching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the mode, operators on tensors without memory launch the kernels of one module, as on a GPU of an arch."""

    def __init__(self, kernels: ModuleType, arch: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._launched = library.launched()
        vars(dispatch)["kernels_for"] = lambda *operands: dispatch.named(kernels)
        vars(dispatch)["layer_kernels"] = lambda dims, rows: dispatch.named(dispatch.around(dims, rows.dtype, arch))
        vars(dispatch)["approximates"] = lambda device: built.APPROXIMATE and arch.startswith("sm_")
        layer_op.forget_calls()  # which may be of another module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._launched.get(func, func)(*args, **(kwargs or {}))


def _calls(scene: Scene, kernels: ModuleType) -> Iterator[Callable[[], None]]:
    key = next(key for key, name in built.VARIANTS.items() if name == scene.variant)
    make = OperatorCaller if scene.operands == "operator" else LayerCaller
    caller: Caller = make(key, scene)
    for steps in scene.lengths or (LENGTHS_AROUND if scene.side == "around" else lengths_of(kernels)):
        yield from caller.of(steps)


def lengths_of(kernels: ModuleType) -> list[int]:
    """Return lengths that differ for the kernels: in the divisors of strides, and long ones from short ones."""
    plan = launch_plan.plan_of(kernels)
    first = [max(LONG, 2 * plan.shortest_segment + 16)]
    if plan.segments > 1:
        first.append(plan.shortest_segment // BATCH)
    if plan.forward_adds:
        first.append(plan.short // BATCH)
    return [longest // 16 * 16 - 16 + divisor for longest in first for divisor in DIVISORS]
