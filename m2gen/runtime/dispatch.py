"""Choose the kernels of a call: shapes name a variant, the device an arch, and programs per SM a bucket."""

from __future__ import annotations

import functools
import os
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from . import built, compiled, launch_plan, launchers
from .facts import LayerKey, VariantKey
from .snapshot import Deferred, deferred

SPACE = built.SPACE
Dims = TypeVar("Dims", tuple[int, ...], LayerKey)
Kernels: TypeAlias = tuple[ModuleType, ...]
"""Modules that serve a variant: one for all calls, or one for each bucket."""


def _modules(tables: Mapping[str, Mapping[str, tuple[str, ...]]]) -> Mapping[str, Mapping[str, Kernels]]:
    """Put kernels in place of their modules' names; a content's are loaded once a process, for whoever has it."""
    source = functools.cache(lambda name: deferred(f"{__package__}.kernels.{name}"))

    def together(names: tuple[str, ...]) -> Callable[[], Kernels]:
        modules = tuple(map(source, names))
        return lambda: tuple(module() for module in modules)

    if not hasattr(SPACE, "kernels"):
        SPACE.kernels = {
            arch: Deferred({variant: together(names) for variant, names in table.items()})
            for arch, table in tables.items()
        }
    kernels: Mapping[str, Mapping[str, Kernels]] = SPACE.kernels
    return kernels


KERNELS = _modules(built.KERNELS)


def _by_dims(kind: str, table: Mapping[Dims, str]) -> Mapping[Dims, ModuleType]:
    """Do for kernels that depend on dims and heads, and perhaps a dtype, what ``_modules`` does."""
    if not hasattr(SPACE, kind):
        sources = {key: deferred(f"{__package__}.kernels.{name}") for key, name in table.items()}
        setattr(SPACE, kind, Deferred(sources))
    kernels: Mapping[Dims, ModuleType] = getattr(SPACE, kind)
    return kernels


LAYER_KERNELS = _by_dims("layer_kernels", built.LAYER_KERNELS)
LAYER_TUNED = {arch: _by_dims(f"layer_tuned_{arch}", table) for arch, table in built.LAYER_TUNED.items()}
POOL_KERNELS = _by_dims("pool_kernels", built.POOL_KERNELS)
POOL_EXPLICIT = {arch: _by_dims(f"pool_explicit_{arch}", table) for arch, table in built.POOL_EXPLICIT.items()}


@functools.cache
def device_of(device: torch.device) -> tuple[str, int]:
    """Return the key of KERNELS that serves ``device``, and its SMs; warns of an arch that was not built for."""
    if device.type == "meta":
        return "portable", built.PORTABLE_SMS
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("m2rnn on CPU tensors must run with TRITON_INTERPRET=1 set before triton is imported")
        return "portable", built.PORTABLE_SMS
    if device.type != "cuda":
        raise RuntimeError(f"m2rnn: kernels run on GPUs of NVIDIA and AMD, got tensors on {device}")
    arch = arch_of(device)
    sms: int = torch.cuda.get_device_properties(device).multi_processor_count
    if arch not in KERNELS:
        known = ", ".join(KERNELS)
        warnings.warn(f"{built.NAME} was built for {known}; {arch} gets the portable kernels", stacklevel=2)
        arch = "portable"
    return arch, sms


def arch_of(device: torch.device) -> str:
    """Return the arch of a GPU, whether or not kernels were built for it."""
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def present(device: torch.device) -> torch.device:
    """Return ``device`` if tensors on it can have memory here, else the meta device: a fake tensor may claim any."""
    if device.type == "cpu":
        there = os.environ.get("TRITON_INTERPRET") == "1"
    else:
        there = device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
    return device if there else torch.device("meta")


@functools.cache
def table_of(variant: VariantKey, device: torch.device) -> tuple[Kernels, tuple[int, ...]]:
    """Return the kernels of a key of VARIANTS, and the most sequences that each but the last of them serves."""
    arch, sms = device_of(device)
    name, heads = built.VARIANTS[variant], max(variant[2])
    kernels = KERNELS[arch][name]
    if arch != "portable":
        compiled.provide(kernels, arch)
    return kernels, tuple(halves * sms // (2 * heads) for halves in built.HALVES)


def kernels_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    A_log: Tensor | None,
    cu_seqlens: Tensor | None,
) -> ModuleType:
    """Return the module whose launchers serve these operands; it depends on the number of sequences, not on lengths."""
    return named(_of_bucket(*table_of(variant_of(q, k, v, weight, forget, A_log), q.device), q, cu_seqlens))


def layer_kernels(dims: Sequence[int], rows: Tensor) -> ModuleType:
    """Return the kernels around the recurrence of K, V and heads, for rows of an input projection."""
    return _ready(around(dims, rows.dtype, device_of(rows.device)[0]), rows.device)


def around(dims: Sequence[int], dtype: torch.dtype, arch: str) -> ModuleType:
    """Return the kernels around a recurrence on an arch: with tiles searched for it, else those for every arch."""
    tuned = LAYER_TUNED.get(arch, {})
    key = (dims[0], dims[1], tuple(dims[2:]), dtype)
    return tuned[key] if key in tuned else LAYER_KERNELS[tuple(dims[:6])]


def pool_kernels(dims: Sequence[int], device: torch.device) -> ModuleType:
    """Return the kernels on pools of K, V and heads; they are the same for every arch and dtype."""
    return _ready(POOL_KERNELS[tuple(dims)], device)


def pool_steps_kernels(dims: Sequence[int], q: Tensor, seeded: bool) -> ModuleType:
    """Return the kernel of tokens on pools for operands as q is, whose states are rounded at random if ``seeded``."""
    explicit = POOL_EXPLICIT.get(device_of(q.device)[0], {})
    if q.dtype.itemsize == 2 and not seeded and tuple(dims) in explicit:
        return _ready(explicit[tuple(dims)], q.device)
    return pool_kernels(dims, q.device)


def approximates(device: torch.device) -> bool:
    """Whether tanh is the one that NVIDIA's GPUs have, where the spec allows it."""
    return built.APPROXIMATE and device.type == "cuda" and torch.version.hip is None


@functools.cache
def _ready(kernels: ModuleType, device: torch.device) -> ModuleType:
    """Return kernels of every arch, with Triton's cache having what the package brings along; raises where none run."""
    arch, _ = device_of(device)
    if arch != "portable":
        compiled.provide((kernels,), arch)
    return named(kernels)


@functools.cache
def named(kernels: ModuleType) -> ModuleType:
    """Have Triton hash the functions of a module in the order of their definitions, and return the module.

    A kernel's hash, its name in Triton's cache, depends on which of the functions that it calls have theirs already.
    """
    for function in list(vars(kernels).values()):
        getattr(function, "cache_key", None)
    return kernels


def _of_bucket(kernels: Kernels, most: Sequence[int], q: Tensor, cu_seqlens: Tensor | None) -> ModuleType:
    if len(kernels) == 1:
        return kernels[0]
    return kernels[bisect_left(most, q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)]


def checkpoints_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    A_log: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[int, torch.dtype]:
    """Return how many states a call saves, as the launchers count, and their dtype.

    A compiler that knows the number of sequences as a symbol learns its bucket only where the answer depends on it.
    """
    kernels, most = table_of(variant_of(q, k, v, weight, forget, A_log), present(q.device))
    plans = [launch_plan.plan_of(module) for module in kernels]
    if len({(plan.interval, plan.checkpoints) for plan in plans}) > 1:
        plans = [launch_plan.plan_of(_of_bucket(kernels, most, q, cu_seqlens))]
    dtype: torch.dtype = getattr(torch, plans[0].checkpoints)
    return launchers.sizes(plans[0], q, cu_seqlens)[-1], dtype


def variant_of(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, forget: Tensor, A_log: Tensor | None) -> VariantKey:
    """Return what VARIANTS is keyed by; a compiler that knows sizes as symbols learns that these are constants."""
    heads = (q.shape[-2], k.shape[-2], v.shape[-2], forget.shape[-1], weight.shape[0])
    return (int(q.shape[-1]), int(v.shape[-1]), tuple(int(count) for count in heads), q.dtype, A_log is not None)
