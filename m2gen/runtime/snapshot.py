"""Modules as they are now: what runs beneath the operators lasts longer than what it was imported from.

A reload, such as IPython's of a package that was built again, gives a module's names other values and its functions
other code, in place. A graph that was recorded before it still needs the kernels that it began with.
"""

from __future__ import annotations

import functools
import importlib.util
import linecache
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any, TypeVar, cast

K = TypeVar("K")
V = TypeVar("V")


class Deferred(Mapping[K, V]):
    """A mapping whose values are made when they are first looked up, by functions that remember them."""

    def __init__(self, makers: Mapping[K, Callable[[], V]]) -> None:
        self._makers = makers

    def __getitem__(self, key: K) -> V:
        return self._makers[key]()

    def __iter__(self) -> Iterator[K]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def deferred(name: str) -> Callable[[], ModuleType]:
    """Read the source of the module ``name`` now, and return what executes it once, when it is first needed.

    The module is the caller's alone: it stays in no table from which a reload could take it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    text = cast(InspectLoader, spec.loader).get_source(name) or ""
    made: list[ModuleType] = []

    def module() -> ModuleType:
        with _LOCK:  # or two threads would have two of it
            if not made:
                made.append(_executed(spec, text))
        return made[0]

    return module


_LOCK = threading.RLock()


def _executed(spec: ModuleSpec, text: str) -> ModuleType:
    """Return a module of this source, which Triton reads while that is executed, whatever the file is by now."""
    module, path = importlib.util.module_from_spec(spec), str(spec.origin)
    with _entry(sys.modules, spec.name, module), _entry(linecache.cache, path, _lines(text, path)):
        exec(compile(text, path, "exec", dont_inherit=True), vars(module))
        for function in list(vars(module).values()):
            if hasattr(function, "rewrite") and not isinstance(function, type):
                function.rewrite()  # Triton's interpreter would read the source when a function first runs
    return module


def _lines(text: str, path: str) -> tuple[int, None, list[str], str]:
    """Return what ``linecache`` keeps of a file that it does not look for on disk."""
    return len(text), None, text.splitlines(keepends=True), path


@contextmanager
def _entry(table: dict[str, Any], key: str, value: object) -> Iterator[None]:
    """Have a table hold a value for a while."""
    known = table.get(key, table)
    table[key] = value
    try:
        yield
    finally:
        del table[key]
        if known is not table:
            table[key] = known


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
