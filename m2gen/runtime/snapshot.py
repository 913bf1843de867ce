"""Modules as they are now: what runs beneath the operators lasts longer than what it was imported from.

A reload, such as IPython's of a package that was built again, gives a module's names other values and its functions
other code, in place. A graph that was recorded before it still needs the kernels that it began with.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Mapping
from types import FunctionType, ModuleType
from typing import Any


def load(name: str) -> ModuleType:
    """Execute the module ``name`` for the caller alone: it stays in no table from which a reload could take it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module = importlib.util.module_from_spec(spec)
    known = sys.modules.get(name)
    sys.modules[name] = module  # where Triton looks for the source, if that is in an archive
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
        if known is not None:
            sys.modules[name] = known
    return module


def snapshot(names: Mapping[str, Any], taken: dict[str, ModuleType] | None = None) -> ModuleType:
    """Return a module that has the ``names`` of another, and whose functions see these and no later ones.

    The modules of its package that it knows by name are copied likewise, each once: ``taken`` has those by name.
    """
    taken = {} if taken is None else taken
    copy = taken[names["__name__"]] = ModuleType(names["__name__"], names["__doc__"])
    own = vars(copy)
    own.update(names)
    package = names["__name__"].rpartition(".")[0]
    for name, x in names.items():
        if isinstance(x, ModuleType) and x.__name__.rpartition(".")[0] == package:
            own[name] = taken.get(x.__name__) or snapshot(vars(x), taken)
        elif isinstance(x, FunctionType) and x.__globals__ is names:
            own[name] = _seeing(own, x)
        elif hasattr(x, "cache_info") and x.__wrapped__.__globals__ is names:
            own[name] = functools.cache(_seeing(own, x.__wrapped__))
    return copy


def _seeing(names: dict[str, Any], function: FunctionType) -> FunctionType:
    """Return a function of the same code, whose globals are ``names``."""
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__, copy.__doc__ = function.__kwdefaults__, function.__doc__
    return copy


def reload_older(package: str, space: object) -> None:
    """Reload what was made of a package's facts when these had another ``space``: what serves a call is theirs."""
    for name in ("dispatch", "library"):
        module = sys.modules.get(f"{package}.{name}")
        if getattr(module, "SPACE", space) is not space and module is not None:
            importlib.reload(module)
