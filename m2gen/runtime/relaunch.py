"""Launch a kernel, and keep what launches its binary again."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Pointers: TypeAlias = Sequence[Tensor | None]
Known: TypeAlias = dict[Hashable, Callable[[Pointers], None]]
"""What launches binaries again, for calls that agree in shapes, strides, dtypes, alignment and device of all tensors,
and in which tensors are there."""


class KernelLaunch(NamedTuple):
    """A launch of a kernel, but for its pointers, which come before all other arguments."""

    kernel: Any
    programs: int
    scalars: tuple[float, ...]
    flags: Mapping[str, bool | int]
    """Constants, in the order of the kernel's parameters."""
    options: Mapping[str, int]
    """How Triton compiles the kernel."""


def launch(launched: KernelLaunch, pointers: Pointers, known: Known | None = None, key: Hashable = None) -> None:
    """Launch a kernel; ``known``, if given, keeps under ``key`` what launches it with other pointers.

    Triton chooses a binary by types, alignment and sizes of the arguments, which takes most of a call's time on the
    host; so a caller that knows them to be the same keeps the choice. The interpreter has no binaries to keep.
    """
    kernel, programs, scalars, flags, options = launched
    compiled = kernel[(programs, 1, 1)](*pointers, *scalars, **flags, **options)
    if known is not None and compiled is not None:
        first = pointers[0]
        device = -1 if first is None else first.get_device()
        known[key] = relaunch(compiled, programs, (*scalars, *flags.values()), device)


def relaunch(compiled: Any, programs: int, rest: Sequence[float], device: int) -> Callable[[Pointers], None]:
    """Return what launches a binary on other pointers, which it takes as addresses, on the device's current stream.

    It calls the binary's launcher itself, as generated code of torch.compile does, unless a hook must see the launch.
    """
    hooks = importlib.import_module("triton").knobs.runtime
    bound, run = compiled[(programs, 1, 1)], compiled.run
    function, metadata, stream_of = compiled.function, compiled.packed_metadata, current_stream_of()

    def again(pointers: Pointers) -> None:
        addresses = [None if x is None else x.data_ptr() for x in pointers]
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # chains of hooks, or one each
            bound(*addresses, *rest, stream=stream_of(device))
        else:
            run(programs, 1, 1, stream_of(device), function, metadata, None, None, None, *addresses, *rest)

    return again


def current_stream_of() -> Callable[[int], int]:
    """Return the function that gives a device's current stream as Triton launches on it."""
    stream_of: Callable[[int], int] = importlib.import_module("triton").runtime.driver.active.get_current_stream
    return stream_of
