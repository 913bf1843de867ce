"""The identity of what a record measured: the constants and kernels that the GPU runs, and their compiler options."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from functools import cache

from m2gen.kernels.lowering import Direction, Lowering
from m2gen.kernels.options import scheduled_options
from m2gen.kernels.render import render_kernel


@cache
def kernel_hash(k: Lowering) -> str:
    """Return 12 hex digits that change when rendered kernels are no longer those that were measured.

    Launchers, docstrings, comments, blank lines and the order of functions do not count, since the GPU sees none.
    """
    options = [sorted(scheduled_options(k, direction).items()) for direction in Direction]
    return hashlib.sha256(f"{gpu_text(render_kernel(k))}\n{options}".encode()).hexdigest()[:12]


def gpu_text(source: str) -> str:
    """Return the constants and the jitted functions of a module, sorted, without docstrings and comments.

    The text is the same whatever Python reads it, which ``ast.unparse`` does not promise.
    """
    lines = _without_comments(source)
    found = []
    for node in ast.parse(source).body:
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


def _lines(first: int, node: ast.stmt) -> set[int]:
    return set(range(first, (node.end_lineno or first) + 1))


def _without_comments(source: str) -> list[str]:
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return lines
