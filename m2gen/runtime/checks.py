"""The checks of a call, before a kernel is launched: once for all calls that are alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import TypeAlias

import torch
from torch.autograd import forward_ad

from . import memory
from .known import KnownCall
from .operands import Tensors, check_operands

_PASSED: dict[Hashable, KnownCall] = {}
"""Calls that passed, by what checks and launches depend on; saves most of the time that a call takes of the host."""
_MOST_PASSED = 4096
Look: TypeAlias = Callable[[str, tuple[str, ...], Tensors, bool], None]
"""Raises an error for the first thing wrong with a caller's tensors."""


def checked_bound(clip: float | None) -> float:
    """Return the bound on the state's gradient that ``clip`` asks for; infinity for None."""
    try:
        bound = math.inf if clip is None else float(clip)
    except (TypeError, ValueError):
        bound = math.nan
    if not bound >= 0:
        raise ValueError(f"m2rnn: clip must be a bound of at least 0 or None, got {clip!r}")
    return bound


def check(
    caller: str,
    lead: tuple[str, ...],
    tensors: Tensors,
    compiled: bool = True,
    look: Look = check_operands,
    writes: bool = False,
) -> KnownCall | None:
    """Raise one error for the first thing wrong with ``tensors``, by argument name, of a call with ``lead`` dims.

    Without ``compiled`` kernels, as for the reference, any floating-point dtype and any variant will do. ``look`` is
    what looks at the tensors, the last of which the call ``writes``. Returns what is known of such calls, or None for
    one that must go through torch's dispatcher: under a compiler, a tracer, a mode, a transform or a profiler, or with
    tensors that have no memory.
    """
    addresses: list[int] = []
    watched = torch.compiler.is_compiling() or _watched()
    facts = None if watched else _facts(caller, lead, tensors, compiled, addresses)
    if facts is None:
        look(caller, lead, tensors, compiled)
        return None
    call = _PASSED.get(facts)
    if call is None:
        look(caller, lead, tensors, compiled)
        if tensors["q"].is_meta:
            return None
        if len(_PASSED) >= _MOST_PASSED:
            _PASSED.clear()
        call = _PASSED[facts] = KnownCall()
    if writes and (call.places is None or call.places.meet(addresses)):
        read = dict(tensors)
        name, written = read.popitem()
        call.places = memory.check_written(caller, name, written, read, call.places)
    return call


def forget_calls() -> None:
    """Look at every call anew, as other kernels may serve it."""
    _PASSED.clear()


_PLAIN = {torch.Tensor, torch.nn.Parameter}


def _watched() -> bool:
    """Whether a mode, a transform such as vmap or a tangent's, a tracer or a profiler must see the operator."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _facts(
    caller: str, lead: tuple[str, ...], tensors: Tensors, compiled: bool, addresses: list[int]
) -> tuple[Hashable, ...] | None:
    """Return what checks and launches depend on; None where something only stands for a tensor's memory.

    ``addresses`` gets those of the tensors, in order; 0 for those that are not there.
    """
    facts: list[Hashable] = [caller, len(lead), compiled, len(tensors)]
    for x in tensors.values():
        if x is None:
            facts.append(None)
            addresses.append(0)
        elif type(x) in _PLAIN and x.layout is torch.strided and not x.is_neg():  # memory holds the numbers meant
            address = x.data_ptr()
            facts += (x.shape, x.stride(), x.dtype, x.device, address & 15)
            addresses.append(address)
        else:
            return None
    return tuple(facts)
