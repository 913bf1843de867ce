"""Wheels and Hub repositories: loaded where there is no m2gen, and the same bytes for the same package."""

from __future__ import annotations

import inspect
import io
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest
import torch
from command_line import fails, run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from support import ROOT, SCHEDULES, build_package, make_variant

import m2gen.pipeline  # noqa: F401  (fills sys.modules)
from m2gen import __version__
from m2gen.errors import EmitError
from m2gen.package import owned, wheel
from m2gen.package.directory import MANIFEST
from m2gen.package.emit import Origin, manifest_text

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
    assert "Requires: torch\n" in shown
    assert f"Location: {tmp_path / 'environment'}" in shown


def metadata_of(wheel: Path) -> Message:
    """Return a wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


@pytest.mark.usefixtures("no_compiling")
def test_a_wheel_can_be_published(spec: Path) -> None:
    """Its version is one that PyPI takes, made of the content; it has a licence, a page, and no Triton of its own."""
    build("--wheel")
    (wheel,) = (spec.parent / "dist").iterdir()
    name, version, _, tags = parse_wheel_filename(wheel.name)
    assert (name, version.local, version.is_prerelease) == ("m2gen-one", None, False)
    assert version.base_version == __version__
    assert {str(tag) for tag in tags} == {"py3-none-any"}
    facts = metadata_of(wheel)
    assert (facts["Name"], facts["Version"], facts["License-Expression"]) == ("m2gen-one", str(version), "Apache-2.0")
    assert facts["Description-Content-Type"] == "text/markdown"
    assert "from one import M2RNN" in facts.get_payload()
    needs = [Requirement(line) for line in facts.get_all("Requires-Dist")]
    assert [need.name for need in needs if need.marker is None] == ["torch"]
    extras = {need.name: str(need.marker) for need in needs if need.marker}
    assert extras == {"triton": 'extra == "triton"', "transformers": 'extra == "hf"'}
    with zipfile.ZipFile(wheel) as archive:
        (place,) = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
        assert archive.read(place) == (ROOT / "LICENSE").read_bytes()
        (described,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        assert b"Generator: hatchling" in archive.read(described)


@pytest.mark.parametrize(
    ("name", "project"), [("one", "m2gen-one"), ("One", "m2gen-one"), ("a__0", "m2gen-a-0"), ("x_", "m2gen-x")]
)
def test_every_name_of_a_spec_is_one_of_a_wheel(name: str, project: str) -> None:
    """Projects are named as PyPI spells them, and the module keeps the spec's name."""
    package = build_package(name, [make_variant()], SCHEDULES["one_level_atomic"])
    origin = Origin(name, "spec.yaml", "0" * 12)
    data = wheel.wheel(origin, package, manifest_text(package, {}))
    parsed, _, _, _ = parse_wheel_filename(wheel.wheel_name(package))
    assert parsed == canonicalize_name(parsed) == project
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert f"{name}/__init__.py" in archive.namelist()


def test_a_wheel_is_the_same_wherever_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the clock, nor the mask of modes, nor a repository around it, nor modules of the package show."""
    package = build_package("hatchling", [make_variant()], SCHEDULES["one_level_atomic"])
    origin, manifest = Origin("hatchling", "spec.yaml", "0" * 12), manifest_text(package, {})
    first = wheel.wheel(origin, package, manifest)
    (tmp_path / ".gitignore").write_text("*.py\n", encoding="utf-8")
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    before = os.umask(0o077)
    try:
        assert wheel.wheel(origin, package, manifest) == first
    finally:
        os.umask(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", ".gitignore"]


def test_a_wheel_that_cannot_be_built_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last lines of hatchling's output are the reason."""
    package = build_package("one", [make_variant()], SCHEDULES["one_level_atomic"])
    monkeypatch.setattr(wheel, "TORCH", "torch>=")
    with pytest.raises(EmitError, match=r"hatchling must build a wheel of the package, got .*torch>=") as caught:
        wheel.wheel(Origin("one", "one.yaml", "0" * 12), package, manifest_text(package, {}))
    assert "\n" not in str(caught.value)


def test_a_checkout_that_is_not_installed_builds_the_same_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The requirement on Triton is then read where the checkout declares it."""
    package = build_package("one", [make_variant()], SCHEDULES["one_level_atomic"])
    parts = Origin("one", "one.yaml", "0" * 12), package, manifest_text(package, {})
    first = wheel.wheel(*parts)

    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert wheel.wheel(*parts) == first
    monkeypatch.setattr(wheel, "_declared", list)
    with pytest.raises(EmitError, match="must be built by an m2gen that is installed or a checkout, got one that is"):
        wheel.wheel(*parts)


def test_an_installed_m2gen_has_what_wheels_need(tmp_path: Path) -> None:
    """The licence and the templates are in m2gen's own wheel, too."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path / "dist")]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (built,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(built) as archive:
        archive.extractall(tmp_path / "site")
    code = "from m2gen.package import wheel; print(wheel.__file__); print(wheel.license_text(), end='')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=True)
    place, text = done.stdout.split(b"\n", 1)
    assert place.decode() == str(tmp_path / "site" / "m2gen" / "package" / "wheel.py")
    assert text == (ROOT / "LICENSE").read_bytes()
    assert (tmp_path / "site" / "m2gen" / "templates" / "wheel" / "pyproject.toml.j2").is_file()


@pytest.mark.usefixtures("no_compiling")
@pytest.mark.parametrize("content", ["empty", "text", "zip", "folder", "other", "more", "link"])
def test_a_file_that_is_no_wheel_of_m2gens_is_refused(spec: Path, content: str) -> None:
    """A file with the wheel's name stays unless m2gen wrote all of it."""
    build("--wheel")
    (made,) = (spec.parent / "dist").iterdir()
    data, mine = made.read_bytes(), spec.parent / "mine.whl"
    made.unlink()
    match content:
        case "folder":
            made.mkdir()
        case "link":
            mine.write_bytes(b"mine")
            made.symlink_to(mine)
        case "more":
            made.write_bytes(data)
            with zipfile.ZipFile(made, "a") as archive:
                archive.writestr("one/mine.py", "mine")
        case "zip" | "other":
            with zipfile.ZipFile(made, "w") as archive:
                archive.writestr("one/MANIFEST.json", "{}" if content == "zip" else '{"name": "one", "files": {}}')
        case _:
            made.write_bytes(b"" if content == "empty" else b"mine")
    before = made.read_bytes() if content != "folder" else None
    line = fails(2, "build", "--spec", "one.yaml", "--no-verify", "--quiet", "--wheel")
    assert f"{made.relative_to(spec.parent)} must be absent or a wheel that m2gen built" in line
    assert (made.read_bytes() if content != "folder" else None) == before
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_an_older_wheel_is_replaced_and_the_same_is_left(tmp_path: Path) -> None:
    """One that differs in what compiling gave is m2gen's; a link to it stays, and what a killed build left goes."""
    package = build_package("one", [make_variant()], SCHEDULES["one_level_atomic"])
    origin = Origin("one", "one.yaml", "0" * 12)
    (tmp_path / "disk").mkdir()
    (tmp_path / "dist").mkdir()
    real, link = tmp_path / "disk" / "real.whl", tmp_path / "dist" / wheel.wheel_name(package)
    link.symlink_to(real)
    assert wheel.write_wheel(tmp_path / "dist", origin, package, manifest_text(package, {"toolchain": "old"})) == link
    first = real.read_bytes()
    left = tmp_path / "disk" / owned.staging_name("real.whl")
    left.mkdir()
    (left / "real.whl").write_bytes(first[:100])
    wheel.write_wheel(tmp_path / "dist", origin, package, manifest_text(package, {"toolchain": "new"}))
    assert real.read_bytes() != first
    node = real.stat()
    wheel.write_wheel(tmp_path / "dist", origin, package, manifest_text(package, {"toolchain": "new"}))
    assert (real.stat().st_ino, real.stat().st_mtime_ns) == (node.st_ino, node.st_mtime_ns)
    assert link.is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real.whl"]


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
"""Code that imports by path under another name, as the kernels library does."""


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
    line = fails(2, "build", "--spec", "one.yaml", "--no-verify", "--quiet", "--format", "hf-kernel")
    assert "dist/one must be absent, empty or a generated package, got what m2gen did not write: mine;" in line
    (spec.parent / "file").write_text("mine", encoding="utf-8")
    (spec.parent / "link").symlink_to("nowhere")
    options = ["build", "--spec", "one.yaml", "--no-verify", "--quiet"]
    for form in (["--wheel"], ["--format", "hf-kernel"], []):
        assert "--out file must be writable as a folder, got a file" in fails(2, *options, *form, "--out", "file")
        assert "nowhere, which does not exist" in fails(2, *options, *form, "--out", "link")
        assert "must be writable: Not a directory" in fails(2, *options, *form, "--out", "file/deep")
        assert "must be writable: " in fails(2, *options, *form, "--out", "/proc/m2gen")
    assert {path.name for path in spec.parent.iterdir()} == {"one.yaml", "dist", "file", "link"}
