"""A quicker Triton interpreter: it patches triton.language anew for every call of every helper, a third of its time."""

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
