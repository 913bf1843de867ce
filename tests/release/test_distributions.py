"""The wheel and the source distribution of m2gen: each works alone, outside the repository."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from pages import blocks, site
from support import ROOT

from m2gen import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
KINDS = {"wheel": "*.whl", "sdist": "*.tar.gz"}
SHIPPED = ("specs", "templates", "tuning_db")
VARIABLES = ("PYTHONPATH", "M2GEN_TUNING_DB")
"""Variables that would lead an installed m2gen back to the repository."""
OTHERS = [
    "python -m venv .venv && . .venv/bin/activate",
    "ls generated/toy/kernels",
    "PYTHONPATH=. python train.py 150",
]
"""The tutorial's commands that are not m2gen's."""
SHORTER = {
    "m2gen build --spec toy.yaml": "m2gen build --spec toy.yaml --no-verify",
    "m2gen verify --spec toy.yaml --quick": "m2gen verify --spec toy.yaml --quick --case ragged",
    OTHERS[0]: "python -m venv --without-pip .venv && . .venv/bin/activate",
    OTHERS[2]: "PYTHONPATH=. python train.py 2",
}
"""Commands that take minutes in Triton's interpreter, or pip, and what is run of them."""


@dataclass(frozen=True)
class Installed:
    """An m2gen in a virtual environment of its own, run in an empty folder."""

    environment: Path
    folder: Path

    def run(self, *arguments: str) -> str:
        """Run the installed command, and return what it prints; fails with its errors."""
        return self._output(str(self.environment / "bin" / "m2gen"), *arguments)

    def python(self, code: str) -> str:
        """Run code with the environment's Python."""
        return self._output(str(self.environment / "bin" / "python"), "-P", "-c", code)

    def shell(self, command: str) -> str:
        """Run a line of a shell in which the environment is active."""
        return self._output("bash", "-c", f'PATH="{self.environment}/bin:$PATH"; {command}')

    def _output(self, *command: str) -> str:
        variables = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        done = subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel and the source distribution, as the project's backend builds them."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Installed:
    """Install one of the two where nothing else of m2gen is.

    What m2gen requires is not downloaded again: a ``.pth`` file names the folder in which this Python has it. Folders
    named so come last, and their own ``.pth`` files are not read, so an m2gen that is installed there in development
    mode cannot be found.
    """
    (archive,) = built.glob(KINDS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "requirements.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    python = folder / "venv" / "bin" / "python"
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, "--ignore-installed"]
    done = subprocess.run([*command, str(archive)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "work").mkdir()
    return Installed(folder / "venv", folder / "work")


def test_what_is_installed_is_what_was_built(installed: Installed) -> None:
    """The package, its specs, templates and database come from the new environment, and the version is this one's."""
    place = installed.python("import m2gen; print(m2gen.__file__)").strip()
    assert Path(place).is_relative_to(installed.environment)
    assert installed.run("--version") == f"m2gen {__version__}\n"
    facts = json.loads(installed.run("info", "--json"))
    for name in SHIPPED:
        folder = Path(facts["folders"][name])
        assert folder.is_relative_to(installed.environment)
        assert {path.name for path in folder.iterdir()} == {path.name for path in (ROOT / name).iterdir()} - {".lock"}
    assert Path(place).with_name("py.typed").is_file()


def test_the_shipped_spec_builds(installed: Installed) -> None:
    """``m2gen build --spec h100.yaml`` needs nothing of the repository, and finds the shipped records."""
    installed.run("build", "--spec", "h100.yaml", "--no-verify", "--quiet")
    (made,) = (installed.folder / "generated").iterdir()
    schedules = json.loads((made / "MANIFEST.json").read_text(encoding="utf-8"))["schedules"]
    assert {schedule["tier"] for schedule in schedules} >= {"exact", "nearest"}, "the shipped database serves"


def test_the_tutorial_can_be_followed(installed: Installed) -> None:
    """What the tutorial has a reader type works with nothing but what was installed; what takes minutes is shorter."""
    said: dict[str, str] = {}
    for block in blocks(site()["docs/tutorial.md"]):
        if block.file:
            (installed.folder / block.file).write_text(block.text, encoding="utf-8")
        for command in block.commands:
            said[command] = installed.shell(SHORTER.get(command, command))
    assert set(SHORTER) <= set(said)
    assert [command for command in said if not command.startswith("m2gen")] == OTHERS
    assert re.search(r"^step 0: loss 0\.\d+\nstep 1: loss", said[OTHERS[2]], re.MULTILINE)
    assert "k16_v16_n2_fp32_portable" in said[OTHERS[1]]


def test_both_have_the_same_modules(built: Path) -> None:
    """A wheel made from the source distribution has what the wheel has: no module is only in the repository."""
    (wheel,), (sdist,) = (list(built.glob(pattern)) for pattern in KINDS.values())
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    for name in inside:
        assert name in sources or name.removeprefix("m2gen/") in sources, name
    assert {"tests/conftest.py", "CHANGELOG.md", "constraints.txt", "Makefile", "pyproject.toml"} <= sources
    assert not [name for name in sources if ".venv" in name]


def test_the_description_is_for_an_index() -> None:
    """Supported versions are said three times, for pip, for people and for ruff, and agree."""
    versions = re.findall(r":: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE)
    first, last = re.findall(r"3\.(\d+)", PROJECT["requires-python"])
    assert versions == [f"3.{minor}" for minor in range(int(first), int(last))]
    assert "Typing :: Typed" in PROJECT["classifiers"]
    known = set(PROJECT["optional-dependencies"])
    for line in (line for extra in PROJECT["optional-dependencies"].values() for line in extra):
        asked = re.match(r"m2gen\[(.*)\]", line)
        assert not asked or set(asked[1].split(",")) <= known, line


def test_the_version_is_in_one_place() -> None:
    """``m2gen/__init__.py`` has the version, and pyproject.toml reads it there."""
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    assert "version" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tree = ast.parse((ROOT / "m2gen" / "__init__.py").read_text(encoding="utf-8"))
    (assigned,) = (node for node in tree.body if isinstance(node, ast.Assign))
    assert ast.literal_eval(assigned.value) == __version__


SECTION = re.compile(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", re.MULTILINE)
KINDS_OF_CHANGE = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_changelog_keeps_its_convention() -> None:
    """Work in progress is on top, then dated releases, this version's first, with usual kinds of change."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [found.group()[3:] for found in SECTION.finditer(text)]
    sections = SECTION.findall(text)
    assert sections[0] == ("Unreleased", "")
    assert sections[1][0] == __version__
    assert all(date for _, date in sections[1:])
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= KINDS_OF_CHANGE
