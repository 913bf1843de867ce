"""Words: docstrings that stand alone, one class for a name, and kernel modules that hold only what they use."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from support import ROOT, make_schedule, make_variant

from m2gen.device import TARGETS
from m2gen.kernels.lowering import Lowering
from m2gen.kernels.render import render_kernel
from m2gen.schedule import FAMILIES, Family, defaults, problems
from m2gen.spec import Dtype, GateKind

FRAGMENT = re.compile(r"\s*(Of|That|From|Which|Into|Above|Whose)\b")
IN_TEMPLATES = re.compile(r'^\s*r?"""(.*)$', re.MULTILINE)
SOURCES = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("m2gen", "templates", "tools", "examples", "tests")
    for kind in ("*.py", "*.j2")
    for path in sorted((ROOT / folder).rglob(kind))
}
EXPORTED = (
    "LAUNCH", "m2rnn_forward_kernel", "m2rnn_backward_kernel", "m2rnn_step_kernel", "m2rnn_sum_kernel",
    "m2rnn_convolve_kernel", "m2rnn_convolve_backward_kernel", "m2rnn_decay_kernel", "m2rnn_decay_backward_kernel",
    "m2rnn_finish_kernel", "m2rnn_finish_backward_kernel", "m2rnn_scale_kernel", "m2rnn_scale_backward_kernel",
    "m2rnn_decode_kernel", "m2rnn_steps_kernel", "m2rnn_gather_kernel", "m2rnn_scatter_kernel", "m2rnn_keep_kernel",
)  # fmt: skip
"""Names of a kernel module that the rest of a package reads."""
RETIRED = re.compile(r"\b(exchanged|turns?|walk\w*|HAS_\w+|PACKED|d?h_first|d?h_last|d?[qkvxfy]_(s|step)|[xw]_n)\b")
"""Names that kernels had before those of the field: butterfly, tickets, scan, IS_VARLEN, h0, ht, stride_x_s."""
IN_BRACES = re.compile(r"\{\{(.*?)\}\}")
STRINGS = re.compile(r"\"[^\"]*\"|'[^']*'")
KERNELS = [path for folder in ("generated", "tests/golden") for path in sorted((ROOT / folder).rglob("kernels/*.py"))]


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of modules, classes, functions and attributes; in templates, what opens on its own line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".j2":
        yield from IN_TEMPLATES.findall(text)
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


@pytest.mark.parametrize("name", SOURCES)
def test_docstrings_stand_alone(name: str) -> None:
    """No docstring is the end of a sentence that the code begins."""
    assert [text for text in docstrings(SOURCES[name]) if FRAGMENT.match(text)] == []


def test_no_class_is_defined_twice() -> None:
    """A name is of one class, wherever one reads it."""
    trees = (ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for path in (ROOT / "m2gen").rglob("*.py"))
    names = Counter(node.name for tree in trees for node in tree if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def defined(node: ast.stmt) -> set[str]:
    """Return the names that a statement of a module defines: imports, functions, classes and variables."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}


def unused(source: str) -> set[str]:
    """Return the names of a kernel module that the exported ones need neither directly nor through others."""
    body = ast.parse(source).body
    where: dict[str, list[ast.stmt]] = {}
    for node in body:  # a name may be bound again
        for name in defined(node):
            where.setdefault(name, []).append(node)
    reached: set[str] = set()
    waiting = where.keys() & set(EXPORTED)
    while waiting:
        reached |= waiting
        nodes = [node for name in waiting for top in where[name] for node in ast.walk(top)]
        waiting = {node.id for node in nodes if isinstance(node, ast.Name) and node.id in where} - reached
    return where.keys() - reached


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: "/".join(path.parts[-3:]))
def test_kernel_modules_use_all_that_they_define(path: Path) -> None:
    """The exported names need every import, helper function and constant."""
    assert unused(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("gate", GateKind)
@pytest.mark.parametrize("dtype", Dtype)
@pytest.mark.parametrize(("cols", "heads"), [(16, 2), (9, 1), (64, 2)])
def test_kernels_of_any_schedule_use_all_that_they_define(cols: int, heads: int, dtype: Dtype, gate: GateKind) -> None:
    """So do those of the defaults, and of points drawn from each family's axes, with and without shared heads."""
    groups = (1, 1, heads, heads, heads)
    variant, device, random = make_variant(64, cols, groups, dtype, gate=gate), TARGETS["sm_90"], Random(5)
    points = list(defaults(variant, device))
    for family in FAMILIES:
        axes = {} if family.unsupported(variant, device) else dict(family.axes(variant, device))
        drawn = [{name: random.choice(values) for name, values in axes.items()} for _ in range(4)]
        points += [point for values in drawn if axes and not problems(variant, point := family.of(values), device)]
    for point in points:
        assert unused(render_kernel(Lowering(variant, point))) == set(), point.slug


@pytest.mark.parametrize("gate", GateKind)
@pytest.mark.parametrize(("cols", "families"), [(64, set(Family)), (16, {Family.PORTABLE, Family.MMA})])
def test_kernels_speak_the_words_of_the_field(cols: int, families: set[Family], gate: GateKind) -> None:
    """No retired name is back; Gluon's language is ``gl``, and Triton's is ``tl``."""
    variant, device = make_variant(64, cols, (1, 1, 2, 2, 2), "bf16", gate=gate), TARGETS["sm_90"]
    points = [*defaults(variant, device), replace(make_schedule(), segments=2)]
    assert {point.family for point in points} == families
    for point in points:
        lowering = Lowering(variant, point)
        text = render_kernel(lowering)
        assert RETIRED.search(text) is None, point.slug
        other = "tl" if lowering.gluon else "gl"
        assert re.search(rf"(?<![\w.]){other}\b", text) is None, point.slug


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("templates/kernels/")])
def test_templates_of_kernels_do_no_arithmetic(name: str) -> None:
    """Python decides; templates place."""
    text = SOURCES[name].read_text(encoding="utf-8")
    assert "{% set" not in text
    placed = [STRINGS.sub("", found).strip("- ") for found in IN_BRACES.findall(text)]
    assert [found for found in placed if re.search("[-+*/%]", found)] == []
    assert len(text.splitlines()) >= 15, "a shorter fragment hides what the kernel does"
