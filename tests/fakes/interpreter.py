"""Triton's interpreter for tests: it patches triton.language once a launch, and is as strict as that of 3.9."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


def quicken() -> None:
    """Make the interpreter patch triton.language once a launch; where it is built otherwise, leave it alone."""
    import triton.language as tl
    from triton.runtime import interpreter

    scopes = getattr(interpreter, "_LangPatchScope", None)
    if scopes is None or getattr(interpreter._patch_lang, "once", False):
        return
    patch: Callable[[Any], Any] = interpreter._patch_lang
    done: set[frozenset[int]] = set()

    @cache
    def seen_by(function: Any) -> frozenset[int]:
        """Return the modules that a call of ``function`` patches."""
        return frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)

    def once(function: Any) -> Any:
        key = seen_by(function)
        if key in done:
            return scopes()  # nothing was patched, so there is nothing to restore
        scope, outermost = patch(function), not done
        done.add(key)
        if outermost:  # a launch: when it restores, whatever it patched is to be patched again
            restore = scope.restore

            def restoring() -> None:
                done.clear()
                restore()

            scope.restore = restoring
        return scope

    once.once = True  # type: ignore[attr-defined]
    interpreter._patch_lang = once


def refuse_mixed_masks() -> None:
    """Make the interpreter refuse the conjunction of a scalar and a block mask, as that of Triton 3.9 does."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime.interpreter import InterpreterBuilder

    conjunction: Callable[[Any, Any, Any], Any] = TritonSemantic.and_
    if getattr(conjunction, "strict", False):
        return

    def strict(self: Any, one: Any, other: Any) -> Any:
        masks = [x for x in (one, other) if isinstance(x, core.tensor) and x.type.scalar.is_int1()]
        if isinstance(self.builder, InterpreterBuilder) and len({mask.type.is_block() for mask in masks}) == 2:
            raise TypeError("masks must both be scalars or both be blocks; write tl.where(scalar, block, False)")
        return conjunction(self, one, other)

    strict.strict = True  # type: ignore[attr-defined]
    TritonSemantic.and_ = strict
