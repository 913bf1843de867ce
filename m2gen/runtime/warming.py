"""Warm-up: everything that calls will launch is compiled into Triton's cache, in parallel, with or without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch

from . import built, compiled, dispatch
from .absent import target_of
from .crew import compile_all
from .facts import VariantKey
from .not_built import first
from .scenes import Kernel, Scene

__all__ = ["Calls", "WarmedUp", "warm_up"]

USES = {
    "train": (("forward", "backward", "around"), ("", "int32")),
    "train_states": (("forward", "backward", "around"), ("", "int32")),
    "infer": (("forward", "around"), ("", "int32", "int64")),
    "decode": (("forward", "around"), ("",)),
}
"""Kernels of each use, and dtypes of the offsets of its packed batches (empty for a dense one)."""
SIDES = ("backward", "forward", "around")
"""In the order of how long they compile."""
OPERANDS = ("layer", "operator", "autocast")


class Calls(NamedTuple):
    """How kernels will be called, which decides what Triton compiles of them."""

    uses: Sequence[str] = ("train", "infer", "decode")
    """What is done: ``train``; ``infer``, with an initial state and without; ``decode``; and ``train_states``, training
    in which initial states are given or final states have gradients."""
    operands: Sequence[str] = ("layer", "operator")
    """Tensors that are passed: ``layer``, those of ``M2RNN`` in the kernels' dtype; ``operator``, contiguous ones of
    that dtype; ``autocast``, those of ``M2RNN`` with parameters in float32."""
    lengths: Sequence[int] = ()
    """Steps of the sequences of a dense batch; empty for any, which compiles kernels once more for odd ones."""
    deterministic: bool | None = None
    """Whether sums have a fixed order, as in ``m2rnn``."""


class WarmedUp(NamedTuple):
    """How many kernels a warm-up compiled, and how many lay in Triton's cache."""

    compiled: int
    found: int


def warm_up(
    device: torch.device | str | int | None = None,
    layers: Iterable[str] = (),
    dtypes: Iterable[torch.dtype] = (),
    calls: Calls | None = None,
    processes: int | None = None,
) -> WarmedUp:
    """Compile the kernels that calls will launch into Triton's cache, so that a first call waits for no compiler.

    ``device`` is a GPU, the current one if None; or an arch, such as ``"sm_90"``, of a GPU that need not be there.
    ``layers`` are names of the spec's layers, or variants' keys, and ``dtypes`` those of q, k and v; all that was built
    if empty. ``calls`` says what will be called, and ``processes`` how many compile at once: as many as there are CPUs
    if None, and no more than one for each 2 GiB or so of memory is sound.

    Nothing is launched. Triton names kernels as launches do, so the same Triton in the same environment finds them, in
    this process or another, on any machine to which ``$TRITON_CACHE_DIR`` is copied under the same path.

    Raises ValueError for what is not built or no use, RuntimeError for kernels that cannot be compiled.
    """
    kernels = compile_calls(arch_of(device), layers, dtypes, calls or Calls(), processes)
    found = sum(kernel.found for kernel in kernels)
    return WarmedUp(len(kernels) - found, found)


def compile_calls(
    arch: str,
    layers: Iterable[str],
    dtypes: Iterable[torch.dtype],
    calls: Calls,
    processes: int | None = None,
    anywhere: bool = False,
) -> list[Kernel]:
    """Do what ``warm_up`` does, and return the kernels; ``anywhere`` as of ``compile_all``."""
    groups = scenes_of(arch, chosen(layers, dtypes), calls)
    for modules in _table(arch).values():
        compiled.provide(modules, arch)
    return compile_all(groups, arch, _cpus() if processes is None else processes, anywhere)


def arch_of(device: torch.device | str | int | None) -> str:
    """Return the arch of a GPU, or that which ``device`` names; raises ValueError for what is neither."""
    if isinstance(device, str) and device.startswith(("sm_", "gfx")):
        target_of(device)
        return device
    try:
        place = torch.device("cuda" if device is None else device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type != "cuda":
        raise ValueError(f"warm_up: device must be a GPU, or an arch such as sm_90, got {device!r}")
    if not torch.cuda.is_available():
        raise ValueError(f"warm_up: device must be an arch such as sm_90 where there is no GPU, got {device!r}")
    return dispatch.arch_of(place)


def _table(arch: str) -> Mapping[str, dispatch.Kernels]:
    return dispatch.KERNELS.get(arch, dispatch.KERNELS["portable"])


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chosen(layers: Iterable[str], dtypes: Iterable[torch.dtype]) -> list[VariantKey]:
    """Return the variants of these layers and dtypes, all if none is named; raises ValueError if nothing is built."""
    keys = dict(built.VARIANTS)
    wanted = set(dtypes)
    named: set[VariantKey] = set()
    for name in layers:
        points = built.LAYERS.get(name, ())
        having = {key for key, variant in keys.items() if variant == name or key[:3] in points}
        if not having:
            raise ValueError(f"warm_up: layers must be of {first(built.LAYERS)} or keys of variants, got {name!r}")
        named |= having
    found = [key for key in keys if (not named or key in named) and (not wanted or key[3] in wanted)]
    if not found:
        raise ValueError(f"warm_up: dtypes must be those of built variants, got {', '.join(map(str, wanted))}")
    return found


def scenes_of(arch: str, variants: Iterable[VariantKey], calls: Calls) -> list[list[Scene]]:
    """Return what reaches every kernel of the variants on an arch, in groups that may share some; the longest first.

    Raises ValueError for a use or operands that there are not, and for lengths below 1.
    """
    for steps in calls.lengths:
        if steps < 1:
            raise ValueError(f"warm_up: lengths must be at least 1, got {steps}")
    for given, known in ((calls.uses, USES), (calls.operands, OPERANDS)):
        for name in given:
            if name not in known:
                raise ValueError(f"warm_up: calls must be of {', '.join(known)}, got {name!r}")
    deterministic = calls.deterministic
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    groups = []
    for key in variants:
        name = built.VARIANTS[key]
        operands = [each for each in calls.operands if _reaches(each, key)]
        for i, module in enumerate(dict.fromkeys(map(compiled.name_of, _table(arch)[name]))):
            for use in calls.uses:
                sides, offsets = USES[use]
                for side, dtype in product(sides, offsets):
                    if side == "around" and (i or dtype == "int64"):
                        continue  # the layer's own kernels are the same for every module, and make offsets their own
                    facts = (dtype, side, tuple(calls.lengths), deterministic)
                    having = [each for each in operands if side != "around" or _has_own(each, key)]
                    groups.append([Scene(module, name, use, each, *facts) for each in having])
    return sorted(filter(None, groups), key=lambda group: (SIDES.index(group[0].side), group[0].use == "decode"))


def _has_own(operands: str, key: VariantKey) -> bool:
    """Whether calls with such operands launch kernels of the layer around the recurrence."""
    rows, cols, heads = key[:3]
    return operands != "operator" and (rows, cols, *heads[:4]) in built.LAYER_KERNELS


def _reaches(operands: str, key: VariantKey) -> bool:
    """Whether calls with such operands have this variant's kernels launched, and no other operands do the same."""
    dtype, computes_gate = key[3:]
    if operands == "operator":
        return True
    if operands == "autocast" and dtype == torch.float32:
        return False
    return computes_gate or (*key[:4], True) not in built.VARIANTS
