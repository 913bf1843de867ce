"""Triton's interpreter for tests: it patches triton.language once a launch, and is as strict as that of 3.9."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


def quicken() -> None:
    """Have the interpreter do once what it does for each launch and value; where it is built otherwise, nothing."""
    _patch_once_a_launch()
    _remember_types()


def _remember_types() -> None:
    """Have values share what their types say: of a dtype numpy's, of a block's shape its constants and its name."""
    from triton.language import core
    from triton.runtime import interpreter

    known = interpreter._get_np_dtype
    example = vars(core.tensor(None, core.block_type(core.int32, [2, 4])))
    said = vars(core.block_type(core.int32, [2, 4]))
    if getattr(known, "once", False):
        return
    if set(example) != {"handle", "shape", "numel", "type", "dtype"} or set(said) != {
        "element_ty", "shape", "numel", "name"
    }:  # fmt: skip
        return

    dtypes: dict[str, Any] = {}
    sizes: dict[tuple[int, ...], tuple[Any, Any]] = {}
    blocks: dict[tuple[str, tuple[Any, ...]], dict[str, Any]] = {}
    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__

    def dtype_of(triton_type: Any) -> Any:
        name = triton_type.scalar.name
        if name not in dtypes:
            dtypes[name] = known(triton_type)
        return dtypes[name]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in sizes:
            make_tensor(self, handle, type)
            sizes[key] = (self.shape, self.numel)
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = sizes[key]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        if not isinstance(shape, (list, core.tuple)):
            make_block(self, element_ty, shape)
            return
        key = (element_ty.name, tuple(x.value if isinstance(x, core.constexpr) else x for x in shape))
        if key not in blocks or not all(isinstance(x, int) for x in key[1]):
            make_block(self, element_ty, shape)
            blocks[key] = {"shape": self.shape, "numel": self.numel, "name": self.name}
            return
        self.element_ty = element_ty
        vars(self).update(blocks[key])

    dtype_of.once = True  # type: ignore[attr-defined]
    interpreter._get_np_dtype = dtype_of
    core.tensor.__init__, core.block_type.__init__ = tensor, block


def _patch_once_a_launch() -> None:
    """Make the interpreter patch triton.language once a launch."""
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
