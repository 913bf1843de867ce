"""Wheels and Hub repositories: loaded where there is no m2gen, and the same bytes for the same package."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from command_line import fails, run

import m2gen.pipeline  # noqa: F401  (fills sys.modules)
from m2gen.package.write import MANIFEST

STAGE = sys.modules["m2gen.pipeline.build"]
BLOCKED = ("jinja2", "optuna", "pydantic", "yaml", "typer", "sqlalchemy")
USE = f"""
import importlib.util
import sys
assert importlib.util.find_spec("m2gen") is None
sys.modules.update(dict.fromkeys({BLOCKED!r}))  # importing them raises, as where they are not installed
import torch
{{load}}
torch.manual_seed(0)
layer = one.M2RNN.from_variant("base", 8)
x = torch.randn(1, 3, 8)
y = layer(x)
y.square().sum().backward()
layer.backend = "reference"
assert torch.allclose(y, layer(x), atol=1e-5), (y - layer(x)).abs().max()
assert all(p.grad is not None for p in layer.parameters())
print(one.__file__)
"""


@pytest.fixture
def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile for no target, which takes seconds and is tested elsewhere."""
    monkeypatch.setattr(STAGE, "check", lambda planned, progress: [])


def build(*options: str) -> str:
    """Build the spec in the working directory and return what the command printed."""
    result = run("build", "--spec", "one.yaml", "--no-verify", "--quiet", *options)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def use(python: Path, folder: Path, load: str) -> str:
    """Load a package in an isolated interpreter without m2gen, train its layer for a step, and return its place."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [str(python), "-I", "-c", USE.format(load=load)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def new_environment(folder: Path) -> Path:
    """Return the interpreter of a new environment that finds torch and triton, and no package that is being tested.

    An editable m2gen is in site-packages by its data files and a .pth file, so what lies beside them is linked.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for place in Path(torch.__file__).parents[1].iterdir():
        if "m2gen" not in place.name and place.suffix != ".pth":
            (site / place.name).symlink_to(place)
    return folder / "bin" / "python"


@pytest.mark.usefixtures("no_compiling")
def test_a_wheel_installs_where_there_is_no_m2gen(spec: Path, tmp_path: Path) -> None:
    """pip installs it, its files are those of the package, and its layer trains."""
    assert "dist/m2gen_one-" in build("--wheel")
    (wheel,) = (spec.parent / "dist").iterdir()
    python = new_environment(tmp_path / "environment")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "environment") in use(python, tmp_path, "import one")
    shown = subprocess.run([*pip[:5], "show", "m2gen-one"], capture_output=True, text=True, check=True).stdout
    assert "Requires: torch, triton" in shown


@pytest.mark.usefixtures("no_compiling")
def test_a_wheel_holds_the_package(spec: Path) -> None:
    """Its modules are the package's own, building again gives the same bytes, and another package another version."""
    build("--wheel")
    build()
    (wheel,) = (spec.parent / "dist").iterdir()
    before = wheel.read_bytes()
    folder = spec.parent / "generated" / "one"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        held = {n.removeprefix("one/"): archive.read(n) for n in archive.namelist() if n.startswith("one/")}
        recorded = [line.split(",")[0] for line in archive.read(archive.namelist()[-1]).decode().splitlines()]
        assert recorded == archive.namelist()
    assert held == {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    build("--wheel")
    assert wheel.read_bytes() == before
    spec.write_text(spec.read_text(encoding="utf-8").replace("q: 1, k: 1", "q: 2, k: 1"), encoding="utf-8")
    build("--wheel", "--out", "dist")
    assert len(list((spec.parent / "dist").iterdir())) == 2


HUB_LOAD = """
place = "dist/one/torch-ext/one"
begin, search = place + "/__init__.py", [place]
found = importlib.util.spec_from_file_location("one_0123abc", begin, submodule_search_locations=search)
one = sys.modules["one_0123abc"] = importlib.util.module_from_spec(found)
found.loader.exec_module(one)
"""
"""As the kernels library does: by path, under a name of its own."""


@pytest.mark.usefixtures("no_compiling")
def test_a_hub_repository_loads_where_there_is_no_m2gen(spec: Path, tmp_path: Path) -> None:
    """The layout is what kernel-builder wants, and the module loads under any name."""
    assert "dist/one: " in build("--format", "hf-kernel")
    folder = spec.parent / "dist" / "one"
    facts = tomllib.loads((folder / "build.toml").read_text(encoding="utf-8"))
    assert facts["general"]["name"] == "one"
    assert {"torch-noarch", "kernel"} <= facts.keys()
    assert (folder / "torch-ext" / "one" / MANIFEST).is_file()
    python = new_environment(tmp_path / "environment")
    assert use(python, spec.parent, HUB_LOAD).endswith("torch-ext/one/__init__.py")
    assert not (spec.parent / "generated").exists()


@pytest.mark.usefixtures("no_compiling")
@pytest.mark.parametrize(("name", "repository"), [("x1", "x1"), ("m2rnn_7b", "m2rnn-7b"), ("a__0", "a--0")])
def test_names_that_the_hub_takes(spec: Path, name: str, repository: str) -> None:
    """The repository is named as the package, with dashes."""
    spec.write_text(spec.read_text(encoding="utf-8").replace("name: one", f"name: {name}"), encoding="utf-8")
    build("--format", "hf-kernel")
    facts = tomllib.loads((spec.parent / "dist" / repository / "build.toml").read_text(encoding="utf-8"))
    assert facts["general"]["name"] == repository


@pytest.mark.usefixtures("no_compiling")
@pytest.mark.parametrize("name", ["x", "One", "m2RNN", "one_"])
def test_names_that_the_hub_does_not_take(spec: Path, name: str) -> None:
    """kernel-builder wants ^[a-z][-a-z0-9]*[a-z0-9]$: nothing is written for another name, which a wheel may have."""
    spec.write_text(spec.read_text(encoding="utf-8").replace("name: one", f"name: {name}"), encoding="utf-8")
    line = fails(2, "build", "--spec", "one.yaml", "--no-verify", "--quiet", "--format", "hf-kernel")
    assert "one.yaml: $.name must be two or more of a-z, 0-9 and _" in line
    assert f"got {name!r}" in line
    assert not (spec.parent / "dist").exists()
    build("--wheel")


def test_hub_layers_have_no_state_of_their_own(modules, device) -> None:
    """The rules of the kernels library: no constructor, no other members, and the forward of the layer replaced."""
    package = modules("one_level_atomic", "carry")
    layer = package.layers.M2RNN
    assert issubclass(layer, torch.nn.Module)
    assert layer.__init__ is torch.nn.Module.__init__
    members = {name for name, _ in inspect.getmembers(layer)} - {
        name for name, _ in inspect.getmembers(torch.nn.Module)
    }
    assert members <= {"can_torch_compile", "has_backward"}
    assert inspect.signature(layer.forward) == inspect.signature(package.M2RNN.forward)
    own = package.M2RNN(8, 16, 16, dict.fromkeys("qkvfw", 1), device=device)
    x = torch.randn(1, 2, 8, device=device)
    assert torch.equal(layer.forward(own, x), own(x))
    assert set(layer.__annotations__) - {"can_torch_compile"} <= {*vars(own), *own._modules, *own._parameters}


@pytest.mark.usefixtures("no_compiling")
def test_what_cannot_be_combined_or_written(spec: Path) -> None:
    """Contradictions are the user's errors; somebody else's folder and a place that cannot be written are left."""
    assert "not both" in fails(2, "build", "--spec", "one.yaml", "--wheel", "--format", "hf-kernel")
    assert "compares packages" in fails(2, "build", "--check", "--wheel")
    (spec.parent / "dist" / "one").mkdir(parents=True)
    (spec.parent / "dist" / "one" / "mine").write_text("mine", encoding="utf-8")
    line = fails(1, "build", "--spec", "one.yaml", "--no-verify", "--quiet", "--format", "hf-kernel")
    assert "got a folder without build.toml" in line
    (spec.parent / "file").write_text("mine", encoding="utf-8")
    line = fails(1, "build", "--spec", "one.yaml", "--no-verify", "--quiet", "--wheel", "--out", "file")
    assert "file must be writable" in line
