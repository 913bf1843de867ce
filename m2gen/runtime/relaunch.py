"""What launches the binary of a kernel again, without looking it up."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Pointers: TypeAlias = Sequence[Tensor | None]


class Again(NamedTuple):
    """What launches a binary again, and what its launcher keeps of calls alike."""

    launch: Callable[[Pointers], None]
    call: Any


Known: TypeAlias = dict[Hashable, Again]
"""Launches for calls that agree in shapes, strides, dtypes, alignment and device of all tensors, and in which there
are."""


class Launched(NamedTuple):
    """A launch of a binary, but for its pointers, which come before all other arguments."""

    compiled: Any
    """What the call of a kernel returned; None by the interpreter, which has no binaries."""
    programs: int
    rest: Sequence[float]
    """Scalars, then constants in the order of the kernel's parameters."""
    device: int


def keep(known: Known, key: Hashable, launched: Launched, call: Any = None) -> None:
    """Keep in ``known`` under ``key`` what launches a binary with other pointers, and ``call``.

    Triton chooses a binary by types, alignment and sizes of the arguments, which takes most of a call's time on the
    host; so a caller that knows them to be the same keeps the choice.
    """
    if launched.compiled is not None:
        known[key] = Again(relaunch(launched), call)


def relaunch(launched: Launched) -> Callable[[Pointers], None]:
    """Return what launches a binary on other pointers, which it takes as addresses, on the device's current stream.

    It calls the binary's launcher itself, as generated code of torch.compile does, unless a hook must see the launch.
    """
    compiled, programs, rest, device = launched
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
