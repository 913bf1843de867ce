"""The operator in the published training code, wherever that version keeps it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

from .. import compat

__all__ = ["Patched", "UnknownVersionError", "patch"]

NAME = "m2rnn"
BLOCK = "lm_engine.modeling_utils.sequence_mixer_blocks.m2rnn"
HOMES = ("xma.layers.m2rnn", BLOCK)
"""Modules that have the operator, each in some versions: a library of kernels, or the training code itself."""
CALLER = f"{BLOCK}.module"
"""Module of the training code whose block calls the operator."""
DISTRIBUTIONS = ("lm-engine", "accelerated-model-architectures")


class UnknownVersionError(ImportError):
    """A version of the published code that has no operator where others have it, or one with other arguments."""


@dataclass(frozen=True)
class Patched:
    """What ``patch`` replaced: the names that now mean this package's operator, and what they meant before."""

    places: tuple[tuple[ModuleType, str], ...]
    before: tuple[Any, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The places as dotted names."""
        return tuple(f"{module.__name__}.{name}" for module, name in self.places)

    def undo(self) -> None:
        """Put back what was there."""
        for (module, name), value in zip(self.places, self.before, strict=True):
            setattr(module, name, value)


def patch() -> Patched:
    """Put this package's operator in the place of the published one, in every module that has imported it.

    Modules that are imported later find it, too. The published block calls the operator only where kernels are on
    (``ENABLE_KERNELS=m2rnn``), so a run needs that as well. A second call replaces nothing more.

    Raises UnknownVersionError, and changes nothing, where no module that is known to have the operator has it, where
    its arguments are not ``compat.m2rnn``'s, or where the installed training code does not call it by that name.
    """
    found = {home: x for home in HOMES if inspect.isroutine(x := getattr(_module(home), NAME, None))}
    originals = list(found.values())
    if not originals:
        raise UnknownVersionError(f"m2rnn: no {NAME} in {' or '.join(HOMES)}; found {_versions()}")
    for home, operator in found.items():
        _check_arguments(home, operator)
    caller = _module(CALLER)
    if caller is None and _module(CALLER.partition(".")[0]) is not None:
        raise UnknownVersionError(f"m2rnn: no module {CALLER}, whose block calls the operator; found {_versions()}")
    if caller is not None and not any(getattr(caller, NAME, None) is operator for operator in originals):
        raise UnknownVersionError(f"m2rnn: {CALLER} does not import {NAME} from {' or '.join(found)}; {_versions()}")
    replaced = [place for place in _places(originals) if getattr(*place) is not compat.m2rnn]
    patched = Patched(tuple(replaced), tuple(getattr(*place) for place in replaced))
    for module, name in replaced:
        setattr(module, name, compat.m2rnn)
    return patched


def _module(name: str) -> ModuleType | None:
    """Return a module, None where it or a package that it is in is not there; errors within it are its own."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise


def _check_arguments(home: str, operator: Callable[..., Any]) -> None:
    wanted = list(inspect.signature(compat.m2rnn).parameters)
    given = list(inspect.signature(operator).parameters)
    if given not in (wanted, wanted[:-1]):  # without kernel_backend in some versions
        rule = f"take ({', '.join(wanted)})"
        raise UnknownVersionError(f"m2rnn: {home}.{NAME} must {rule}, got ({', '.join(given)}); {_versions()}")


def _places(operators: list[Any]) -> Iterator[tuple[ModuleType, str]]:
    """Give every name in the published code's modules that means one of the operators."""
    roots = {home.partition(".")[0] for home in HOMES}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in roots and isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if any(value is operator for operator in operators):
                    yield module, attribute


def _versions() -> str:
    """Say which of the distributions are installed, and in which version."""
    return ", ".join(map(_version, DISTRIBUTIONS))


def _version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"no {name}"
