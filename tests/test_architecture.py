"""What may import what, how large a module may be, and what ``--help`` may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jinja2
import jinja2.nodes
import pytest
from support import ROOT

from m2gen.device import TARGETS
from m2gen.spec import KNOWN_TARGETS

PACKAGE = ROOT / "m2gen"
LINES = 300

ALLOWED: dict[str, str] = {
    "errors": "",
    "bucket": "",
    "cache": "",
    "pool": "",
    "clock": "",
    "device": "errors",
    "spec": "errors",
    "variant": "spec",
    "schedule": "errors spec variant device",
    "heuristic": "device schedule spec variant",
    "demand": "schedule spec variant",
    "outputs": "schedule variant",
    "sums": "outputs schedule spec variant",
    "layouts": "schedule sums variant",
    "signature": "outputs schedule spec sums variant",
    "problem": "spec variant",
    "reference": "spec variant problem",
    "operands": "layouts schedule sums variant",
    "render": "layouts operands outputs schedule signature spec variant",
    "db": "bucket device errors heuristic render schedule spec variant",
    "resources": "device errors",
    "compile": "cache device errors layouts render resources schedule signature variant",
    "verify": "problem reference spec variant",
    "choice": "bucket db device heuristic schedule spec variant",
    "emit": "bucket choice device errors layouts outputs render schedule spec variant",
    "directory": "errors",
    "ship": "directory emit errors render",
    "tune": "bucket cache clock compile db demand device errors heuristic outputs pool problem render resources"
    " schedule spec variant verify",
    "roofline": "schedule spec variant",
    "bench": "clock compile db errors pool problem reference roofline schedule spec tune variant verify",
    "pipeline": "bench bucket cache choice compile db demand device directory emit errors heuristic pool render"
    " resources roofline schedule ship signature spec tune variant verify",
    "report": "verify",
    "plot": "bench errors pipeline",
    "page": "db pipeline roofline schedule spec tune",
    "cli_output": "cache choice device errors pipeline render report",
    "cli_verify": "errors pipeline report verify",
    "cli_options": "db errors pipeline report",
    "cli_bench_output": "bench errors pipeline plot report variant",
    "cli_bench": "bench cli_bench_output cli_options errors pipeline plot",
    "cli_db_output": "db pipeline report",
    "cli_db": "cli_db_output cli_options cli_tune_output db errors pipeline spec",
    "cli_tune_output": "errors page pipeline report tune",
    "cli_tune": "cli_options cli_tune_output compile errors pipeline spec tune",
    "cli": "cli_bench cli_db cli_options cli_output cli_tune cli_verify db directory errors pipeline report spec",
    "__main__": "cli",
}
"""Section 4 of the design as imports of one module by another; a package counts as one module."""

SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """Return the name in ``ALLOWED`` of the module or package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _absolute(path: Path, node: ast.ImportFrom) -> str:
    """Return what a ``from`` names, relative imports resolved."""
    if not node.level:
        return node.module or ""
    package = ("m2gen", *path.relative_to(PACKAGE).parts[:-1])
    return ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module])))


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports anywhere, also in functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(path, node)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def arrows(path: Path) -> set[str]:
    """Return the other modules of m2gen that a file imports."""
    parts = [name.split(".") for name in imported(path)]
    found = {part[1] for part in parts if part[0] == "m2gen" and not part[1].startswith("__version")}
    return found - {module_of(path)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path: Path) -> None:
    """No module imports another that the table does not allow."""
    module = module_of(path)
    allowed = ALLOWED[module].split() if module != "__init__" else []
    assert arrows(path) <= set(allowed), f"m2gen.{module} may import {allowed}"


def test_the_table_is_about_the_modules_that_exist() -> None:
    """Every module has its row, and no row is about a module that is gone."""
    assert set(ALLOWED) == {module_of(path) for path in SOURCES} - {"__init__"}


def test_the_table_has_no_cycle() -> None:
    """The modules can be put in an order in which each imports only earlier ones."""
    left = {module: set(allowed.split()) for module, allowed in ALLOWED.items()}
    while ready := [module for module, allowed in left.items() if not allowed & set(left)]:
        for module in ready:
            del left[module]
    assert left == {}


def test_only_the_entry_point_imports_the_command_line() -> None:
    """Nothing that is not the command line depends on it."""
    interface = {name for name in ALLOWED if name.startswith("cli")}
    users = {module_of(path) for path in SOURCES if interface & arrows(path)}
    assert users <= {*interface, "__main__"}


def test_rendering_is_pure() -> None:
    """What goes into a rendered text imports no torch, no triton, no clock and no random numbers."""
    texts = {"layouts", "operands", "outputs", "render", "schedule", "signature", "spec", "sums", "variant"}
    pure = {"bucket", "db", "device", "errors"} | texts
    for path in SOURCES:
        if module_of(path) in pure - {"device"}:  # detect() asks torch
            roots = {name.split(".")[0] for name in imported(path)}
            assert not roots & {"torch", "triton", "time", "datetime", "random", "uuid"}, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_stay_small(path: Path) -> None:
    """A module that outgrows the limit wants to be two."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


HELP = """
import sys
from m2gen.cli import app
try:
    app({arguments!r})
except SystemExit as stop:
    assert stop.code == 0, stop.code
heavy = {{"torch", "triton", "jinja2", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["build", "--help"], ["db", "why", "--help"], ["version"]], ids=" ".join
)
def test_help_imports_neither_torch_nor_triton(arguments: list[str]) -> None:
    """Asking what the command line can do stays cheap."""
    code = HELP.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_specs_and_devices_know_the_same_targets() -> None:
    """A target that a spec may list has limits, and the other way round."""
    assert set(KNOWN_TARGETS) == set(TARGETS)


@pytest.mark.parametrize("path", sorted((ROOT / "templates").rglob("*.j2")), ids=lambda path: path.name)
def test_no_conditional_is_within_another(path: Path) -> None:
    """Python decides, so a template has one question to ask at a time."""
    syntax = jinja2.Environment().parse(path.read_text(encoding="utf-8"))
    for outer in syntax.find_all(jinja2.nodes.If):
        parts = [*outer.body, *outer.else_]
        assert not any(isinstance(part, jinja2.nodes.If) or part.find(jinja2.nodes.If) for part in parts)
