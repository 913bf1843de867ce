"""Imports follow the layers, modules stay small, and ``--help`` stays cheap."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

from m2gen.device import TARGETS
from m2gen.spec import KNOWN_TARGETS

PACKAGE = ROOT / "m2gen"
LINES = 300

ALLOWED: dict[str, str] = {
    "errors": "",
    "bucket": "",
    "cache": "errors",
    "runtime": "",
    "shipped": "",
    "device": "errors",
    "spec": "errors",
    "variant": "spec",
    "problem": "spec variant",
    "schedule": "bucket device errors spec variant",
    "kernels": "cache device errors runtime schedule spec variant",
    "db": "bucket device errors kernels schedule spec variant",
    "package": "bucket db device errors kernels spec variant",
    "verify": "problem runtime spec variant",
    "measure": "db device errors problem schedule spec variant verify",
    "tune": "bucket cache db device errors kernels measure problem runtime schedule spec variant verify",
    "bench": "db device errors kernels measure problem runtime schedule spec variant verify",
    "pipeline": (
        "bench bucket cache db device errors kernels measure package runtime schedule shipped spec tune variant verify"
    ),
    "cli": (
        "bench bucket cache db device errors kernels measure package pipeline schedule shipped spec tune variant verify"
    ),
    "__main__": "cli",
}
"""Section 4 of the design: what each room, a folder or a module directly in m2gen/, may import of the others."""

SOURCES = sorted(PACKAGE.rglob("*.py"))
MOST_AT_THE_TOP = 10


def room_of(path: Path) -> str:
    """Return the name in ``ALLOWED`` of the folder or module that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    """Return the dotted name of a file's module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def _absolute(path: Path, node: ast.ImportFrom) -> str:
    """Return the module of a ``from``, with relative imports resolved."""
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
    """Return the modules of m2gen that a file imports; of ``from m2gen.a import b`` that is b where b is a module."""
    names = {name for name in imported(path) if name.startswith("m2gen.") and not name.endswith(".__version__")}
    found = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    assert found <= set(MODULES), found - set(MODULES)
    return found - {module_of(path)}


def rooms(path: Path) -> set[str]:
    """Return the other rooms that a file imports from."""
    return {room_of(MODULES[name]) for name in arrows(path)} - {room_of(path)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path: Path) -> None:
    """No file imports from a room that the table does not allow to its own."""
    room = room_of(path)
    allowed = ALLOWED[room].split() if room != "__init__" else []
    assert rooms(path) <= set(allowed), f"m2gen.{room} may import {allowed}"


def test_the_table_is_about_the_rooms_that_exist() -> None:
    """Every room has its row, no row is about a room that is gone, and no row allows what nobody imports."""
    used: dict[str, set[str]] = {room_of(path): set() for path in SOURCES}
    for path in SOURCES:
        used[room_of(path)] |= rooms(path)
    del used["__init__"]
    assert used == {room: set(allowed.split()) for room, allowed in ALLOWED.items()}


def test_tuning_and_benchmarks_are_siblings() -> None:
    """Neither imports the other: both share ``measure``."""
    assert "tune" not in ALLOWED["bench"].split()
    assert "bench" not in ALLOWED["tune"].split()
    assert {"tune", "bench"}.isdisjoint(ALLOWED["measure"].split())


def in_order(graph: dict[str, set[str]]) -> None:
    """Put what imports something after that; raises CycleError, with the circle, where there is no such order."""
    graphlib.TopologicalSorter(graph).prepare()


def test_no_imports_go_in_a_circle() -> None:
    """Neither rooms nor modules import in a circle, including imports in functions and for type checkers."""
    in_order({room: set(allowed.split()) for room, allowed in ALLOWED.items()})
    in_order({name: arrows(path) for name, path in MODULES.items()})


def test_a_circle_would_be_found() -> None:
    """The check fails on two modules of one folder that import each other."""
    with pytest.raises(graphlib.CycleError):
        in_order({"m2gen.db.a": {"m2gen.db.b"}, "m2gen.db.b": {"m2gen.db.a"}})


def test_few_modules_are_outside_the_folders() -> None:
    """Only the nouns that every folder uses are directly in m2gen/."""
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_AT_THE_TOP


@pytest.mark.parametrize("folder", sorted({path.parent for path in SOURCES}), ids=lambda folder: folder.name)
def test_folders_say_what_they_are_for(folder: Path) -> None:
    """The docstring of a folder's ``__init__`` is where a newcomer looks."""
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))


def test_only_the_entry_point_imports_the_command_line() -> None:
    """Nothing that is not the command line depends on it."""
    assert {room_of(path) for path in SOURCES if "cli" in rooms(path)} == {"__main__"}


PURE = {"bucket", "db", "errors", "schedule", "spec", "variant"}
TEXTS = {"arguments", "definitions", "demand", "launch", "launch_plan", "layouts", "literals", "loads", "lowering"}
TEXTS |= {"outputs", "reductions", "render"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rendering_is_pure(path: Path) -> None:
    """Modules that rendered text depends on import no torch, no triton, no clock and no random numbers."""
    if room_of(path) in PURE or (room_of(path) == "kernels" and path.stem in TEXTS | {"__init__"}):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"torch", "triton", "time", "datetime", "random", "uuid"}


RUNTIME = sorted((PACKAGE / "runtime").rglob("*.py"))
FOR_TRANSFORMERS = {"hf", "integrations/flame"}
"""Folders of the runtime that need transformers."""


@pytest.mark.parametrize("path", RUNTIME, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_packages_copy_works_anywhere(path: Path) -> None:
    """Modules of the runtime import each other by relative names, and else torch and the standard library.

    What is for transformers is in folders of its own, which may import that, and which no other module imports.
    """
    folder = path.parent.relative_to(PACKAGE / "runtime").as_posix()
    known = sys.stdlib_module_names | {"torch"} | ({"transformers"} if folder in FOR_TRANSFORMERS else set())
    for other in FOR_TRANSFORMERS - {folder}:
        prefix = f"m2gen.runtime.{other.replace('/', '.')}"
        assert not [name for name in arrows(path) if f"{name}.".startswith(f"{prefix}.")]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= known
        elif isinstance(node, ast.ImportFrom):
            root = str(node.module).split(".")[0]
            own = f"{_absolute(path, node)}.".startswith("m2gen.runtime.")
            assert own if node.level else root in known


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_stay_small(path: Path) -> None:
    """A module that outgrows the limit wants to be two."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


HELP = """
import sys
from m2gen.cli.app import app
try:
    app({arguments!r})
except SystemExit as stop:
    assert stop.code == 0, stop.code
heavy = {{"torch", "triton", "jinja2", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["build", "--help"], ["db", "why", "--help"], ["--version"], ["version"]],
    ids=" ".join,
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
