"""The identity of what a record measured: the constants and kernels that the GPU runs, and their compiler options."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache

from m2gen.kernels.layer import layer_of, render_layer
from m2gen.kernels.lowering import Direction, Lowering
from m2gen.kernels.options import scheduled_options
from m2gen.kernels.render import render_kernel
from m2gen.schedule import AnySchedule
from m2gen.schedule.layer import AnyTiles, LayerTiles
from m2gen.schedule.layer_knobs import LayerKernel, Tiles
from m2gen.variant import Variant

LAYER_FUNCTIONS = {LayerKernel.DECAY: ("decay", "decay_backward")}
"""Kernels that have the tiles of one; others have their own alone."""


def identity_of(variant: Variant, schedule: AnySchedule) -> str:
    """Return the hash of what a schedule runs, a recurrence or one of the kernels around it."""
    if isinstance(schedule, Tiles):
        return layer_kernel_hash(variant, schedule)
    return kernel_hash(Lowering(variant, schedule))


@cache
def layer_kernel_hash(variant: Variant, tiles: AnyTiles) -> str:
    """Return 12 hex digits that change when a layer's kernel is no longer the one that was measured with these tiles.

    Other kernels of its module do not count, nor what ``kernel_hash`` leaves out.
    """
    k = layer_of(variant, LayerTiles.of([tiles]))
    assert k is not None
    names = LAYER_FUNCTIONS.get(tiles.family, (tiles.family,))
    text = gpu_text(render_layer(k), [f"m2rnn_{name}_kernel" for name in names])
    return hashlib.sha256(f"{text}\n{tiles.slug}".encode()).hexdigest()[:12]  # which says the warps


@cache
def kernel_hash(k: Lowering) -> str:
    """Return 12 hex digits that change when rendered kernels are no longer those that were measured.

    Launchers, docstrings, comments, blank lines and the order of functions do not count, since the GPU sees none.
    """
    options = [sorted(scheduled_options(k, direction).items()) for direction in Direction]
    return hashlib.sha256(f"{gpu_text(render_kernel(k))}\n{options}".encode()).hexdigest()[:12]


def gpu_text(source: str, roots: Iterable[str] | None = None) -> str:
    """Return the constants and the jitted functions of a module, sorted, without docstrings and comments.

    With ``roots`` only these functions are there, and what they use. The text is the same whatever Python reads it,
    which ``ast.unparse`` does not promise.
    """
    lines = _without_comments(source)
    found = []
    body = ast.parse(source).body
    for node in body if roots is None else _used(body, roots):
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            kept = _lines(node.decorator_list[0].lineno, node)
            if ast.get_docstring(node) is not None:
                kept -= _lines(node.body[0].lineno, node.body[0])
        elif isinstance(node, ast.AnnAssign):
            kept = _lines(node.lineno, node)
        else:
            continue
        found.append("\n".join(line for number in sorted(kept) if (line := lines[number - 1].rstrip())))
    return "\n".join(sorted(found))


def _used(body: list[ast.stmt], roots: Iterable[str]) -> Iterator[ast.stmt]:
    """Yield the definitions of names and of what these use, each once."""
    defined: dict[str, ast.stmt] = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    defined |= {n.target.id: n for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    waiting, seen = list(roots), set[str]()
    while waiting:
        name = waiting.pop()
        if name in defined and name not in seen:
            seen.add(name)
            yield defined[name]
            waiting += [node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)]


def _lines(first: int, node: ast.stmt) -> set[int]:
    return set(range(first, (node.end_lineno or first) + 1))


def _without_comments(source: str) -> list[str]:
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return lines
