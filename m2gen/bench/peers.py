"""Other implementations to time beside the generated kernels, each behind an adapter of a few lines.

An adapter takes a variant and returns a function with the signature of ``m2rnn``, or None if it cannot serve it:

    def adapter(variant):
        from peer import scan
        return lambda q, k, v, weight, forget, initial_state, cu_seqlens, clip: scan(q, k, v, weight, forget, clip)

q (B, S, Nq, K), k (B, S, Nk, K), v (B, S, Nv, V), weight (Nw, V, V), forget (B, S, Nf) in, y (B, S, N, V) and the final
state (B, N, K, V) in float32 out; ``initial_state`` is None, and so is ``cu_seqlens`` unless a workload is packed: then
tensors have (T,) in place of (B, S). A variant that computes its gate also gets ``A_log`` and ``dt_bias``. The call
must be differentiable and capturable in a CUDA graph. An installed package registers its adapter as an entry point of
the group ``m2gen.bench``; ``m2gen bench --peer module:function`` names one.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from m2gen.bench.kinds import Kind
from m2gen.errors import UsageError
from m2gen.variant import Variant

GROUP = "m2gen.bench"


@dataclass(frozen=True)
class Place:
    """Where adapters of one kind are registered and named."""

    group: str
    """The group of entry points of installed packages."""
    option: str
    """The option of the command line."""


OPERATORS = Place(GROUP, "--peer")
LAYERS = Place(f"{GROUP}.layers", "--peer-layer")
"""Whole layers, whose adapters take a ``m2gen.bench.layers.subject.LayerShape``."""
_ADAPTER = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)


def peers(named: Iterable[str] = (), place: Place = OPERATORS) -> dict[str, str]:
    """Return adapters by the peer's name: those of installed packages, and those that are ``named``.

    Raises UsageError for a name that is not ``module:function``.
    """
    points = metadata.entry_points(group=place.group)
    found = {f"peer {p.name}" if p.name in set(Kind) else p.name: p.value for p in points}
    for adapter in named:
        if not _ADAPTER.fullmatch(adapter):
            raise UsageError(f"{place.option} must be module:function, got {adapter!r}")
        found[adapter] = adapter
    return found


def check_chosen(choice: str, chosen: bool, named: Sequence[str], place: Place = OPERATORS) -> None:
    """Raise UsageError where a ``choice`` of kinds, such as ``--only peer``, contradicts which peers there are."""
    if chosen and not peers(named, place):
        raise UsageError(f"{choice} must come with a {place.option}, or an installed package that has one, got none")
    if named and not chosen:
        option, _, _ = choice.partition(" ")
        raise UsageError(f"{place.option} must be given with {choice}, or without {option}, got {', '.join(named)}")


def operator_of(adapter: str, variant: Variant) -> Callable[..., Any] | None:
    """Import an adapter and return its operator for a variant, or None; raises whatever the peer raises."""
    return found_by(adapter, variant)  # type: ignore[no-any-return]


def found_by(adapter: str, asked: object) -> Any:
    """Import an adapter and return what it has for ``asked``, or None; raises whatever the peer raises."""
    module, _, function = adapter.partition(":")
    if os.getcwd() not in sys.path:  # an installed command does not look there
        sys.path.append(os.getcwd())
    return getattr(importlib.import_module(module), function)(asked)
