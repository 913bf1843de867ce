"""``m2gen build``: what it writes, what it leaves alone, and what ``--check`` finds."""

from __future__ import annotations

import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from command_line import KEY, SPEC, document, fails, outcome, row, run

import m2gen.pipeline  # noqa: F401  (fills sys.modules)
from m2gen.package.emit import Package
from m2gen.package.owned import listed_in

STAGE = sys.modules["m2gen.pipeline.build"]
VERIFY = sys.modules["m2gen.pipeline.verify"]
"""The modules, whose names in the package are those of their functions."""


@pytest.fixture
def built(spec: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a package that the command line built, its kernels compiled for no target."""
    monkeypatch.setattr(STAGE, "check", lambda planned, progress: [])
    result = run("build", "--spec", "one.yaml", "--no-verify", "--quiet")
    assert result.exit_code == 0, result.output
    return spec.parent / "generated" / "one"


def test_build_check(built: Path) -> None:
    """A package is current until it is edited or gets a file of somebody else, and checking changes nothing."""
    assert run("build", "--spec", "one.yaml", "--check").exit_code == 0
    (built / "op.py").write_text("edited\n", encoding="utf-8")
    (built / "stray.py").write_text("stray\n", encoding="utf-8")
    result = run("build", "--spec", "one.yaml", "--check")
    assert result.exit_code == 1
    assert {"-edited", "-stray"} <= set(result.stdout.splitlines())
    assert result.stderr.splitlines() == ["m2gen: one is stale; run `m2gen build --spec one.yaml`"]
    assert document("build", "--spec", "one.yaml", "--check", status=1)["current"] is False
    assert (built / "op.py").read_text(encoding="utf-8") == "edited\n"


def test_build_says_that_it_did_not_verify(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line says on what the package was verified, or that it was not."""
    monkeypatch.setattr(STAGE, "check", lambda planned, progress: [])
    assert run(*BUILD).stdout.endswith(" files, not verified\n")
    monkeypatch.setattr(STAGE, "_verified_once", lambda *_: "a GPU")
    arguments = [argument for argument in BUILD if argument != "--no-verify"]
    assert run(*arguments).stdout.endswith(" files, verified on: a GPU\n")


def test_build_check_without_a_package(spec: Path) -> None:
    """A package that is not there is stale, in two lines, and stays away."""
    result = run("build", "--spec", "one.yaml", "--check")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == ["committed/one: must be a folder, got none"]
    assert result.stderr.splitlines() == ["m2gen: one is stale; run `m2gen build --spec one.yaml`"]
    assert not (spec.parent / "generated").exists()


BUILD = ("build", "--spec", "one.yaml", "--no-verify", "--quiet")


def test_build_refuses_a_folder_of_something_else(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that m2gen did not write are named before anything is compiled."""
    monkeypatch.setattr(STAGE, "check", None)
    (built / "notes.txt").write_text("mine", encoding="utf-8")
    assert fails(2, *BUILD) == (
        "m2gen: generated/one must be absent, empty or a generated package, got what m2gen did not write: notes.txt;"
        " move that elsewhere, or build into another --out"
    )
    assert (built / "notes.txt").read_text(encoding="utf-8") == "mine"
    (built / "notes.txt").unlink()
    (built / "MANIFEST.json").write_text("{}", encoding="utf-8")
    assert "did not write: MANIFEST.json; move" in fails(2, *BUILD)
    (built / "MANIFEST.json").unlink()
    (built / "op.py").write_text("mine", encoding="utf-8")
    assert "did not write: op.py; move" in fails(2, *BUILD)


def test_build_replaces_its_own_and_leaves_the_repository(built: Path) -> None:
    """An edited module is as it should be again, imports' caches go, and .git is what it was; twice is once."""
    before = (built / "op.py").read_bytes()
    (built / "op.py").write_text("edited", encoding="utf-8")
    (built / ".git").mkdir()
    (built / ".git" / "HEAD").write_text("ref: refs/heads/main", encoding="utf-8")
    (built / "__pycache__").mkdir()
    (built / "__pycache__" / "op.cpython-311.pyc").write_bytes(b"edited")
    assert run(*BUILD).exit_code == 0
    assert (built / "op.py").read_bytes() == before
    assert not (built / "__pycache__").exists()
    assert (built / ".git" / "HEAD").read_text(encoding="utf-8") == "ref: refs/heads/main"
    assert run("build", "--spec", "one.yaml", "--check").exit_code == 0
    node = (built / "op.py").stat()
    assert run(*BUILD).exit_code == 0
    assert (built / "op.py").stat() == node
    assert [path.name for path in built.parent.iterdir()] == ["one"]


def test_build_writes_where_a_link_leads(built: Path) -> None:
    """A package folder that is a link stays one."""
    built.rename(built.parent.parent / "elsewhere")
    built.symlink_to("../elsewhere")
    (built / "op.py").write_text("edited", encoding="utf-8")
    assert run(*BUILD).exit_code == 0
    assert built.is_symlink()
    assert (built.parent.parent / "elsewhere" / "op.py").read_text(encoding="utf-8") != "edited"
    assert run("build", "--spec", "one.yaml", "--check").exit_code == 0


def test_a_build_that_fails_verification_leaves_the_old_package(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels over budget are not written over those that are not."""
    before = (built / "MANIFEST.json").read_bytes()
    monkeypatch.setattr(STAGE, "verify", lambda *_: outcome(2e-3))
    assert "t0 must be within 1.00e-03, got 2.00e-03; reproduce: m2gen" in fails(
        1, "build", "--spec", "one.yaml", "--quiet"
    )
    assert (built / "MANIFEST.json").read_bytes() == before


def test_what_a_failed_build_prints_reproduces_it(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command names the spec and the database as they were given, quoted for a shell."""
    monkeypatch.setattr(STAGE, "check", lambda planned, progress: [])
    monkeypatch.setattr(VERIFY, "run_jobs", lambda jobs, progress, interpreted: outcome(2e-3).reports)
    Path("my specs").mkdir()
    spec.rename("my specs/one.yaml")
    given = ("--spec", "my specs/one.yaml", "--no-db")
    expected = f"; reproduce: m2gen verify {shlex.join(given)} --variant {KEY} --case ragged --seed 7"
    assert fails(1, "build", *given, "--quiet").endswith(expected)
    assert fails(1, "verify", *given, "--quiet").endswith(expected)
    (case,) = document("verify", *given, "--quiet", status=1)["cases"]
    assert case["reproduce"] == expected.removeprefix("; reproduce: ")
    Path("my db").mkdir()
    line = fails(1, "verify", *given[:2], "--db", "my db", "--quiet")
    assert f"m2gen verify --spec 'my specs/one.yaml' --db 'my db' --variant {KEY} " in line


def test_a_kernel_that_cannot_launch_fails_the_build(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build stops before anything is written."""
    monkeypatch.setattr(STAGE, "check", lambda planned, progress: [row("too many registers")])
    assert "too many registers" in fails(1, "build", "--spec", "one.yaml", "--quiet")
    assert not (spec.parent / "generated").exists()


def test_check_without_a_spec_takes_every_package(built: Path) -> None:
    """``build --check`` alone compares each package in OUT with the spec that its manifest names."""
    assert run("build", "--check").exit_code == 0
    (built / "op.py").write_text("edited\n", encoding="utf-8")
    assert run("build", "--check").exit_code == 1
    (built.parent / ".one.m2gen-0123456789abcdef").mkdir()
    (built.parent / ".one.m2gen-0123456789abcdef" / "MANIFEST.json").write_text("{", encoding="utf-8")
    assert run("build", "--spec", "one.yaml", "--no-verify", "--format", "hf-kernel", "--out", "hub").exit_code == 0
    assert "at least one" in fails(2, "build", "--check", "--out", "hub")
    assert run(*BUILD).exit_code == 0
    assert run("build", "--check").exit_code == 0
    for wrong in ("{}", "[]", "<<<<<<< HEAD", '{"spec": 1}'):
        (built / "MANIFEST.json").write_text(wrong, encoding="utf-8")
        assert "generated/one/MANIFEST.json must be a package's manifest" in fails(2, "build", "--check")
    assert "at least one" in fails(2, "build", "--check", "--out", "elsewhere")


def test_check_compares_the_folder_whose_manifest_it_read(built: Path) -> None:
    """A copy, and a spec of the same file name that is of another package, are told apart from what is current."""
    shutil.copytree(built, built.parent / "other")
    line = fails(2, "build", "--check")
    assert line.startswith("m2gen: generated/other/MANIFEST.json: $.name must be its folder's, 'other', got 'one'; ")
    assert line.endswith("by --spec")
    shutil.rmtree(built.parent / "other")
    Path("one.yaml").write_text(SPEC.replace("name: one", "name: another"), encoding="utf-8")
    (built / "op.py").write_text("edited\n", encoding="utf-8")
    assert fails(2, "build", "--check") == (
        "m2gen: generated/one/MANIFEST.json: $.spec.file must name a spec of one, got one.yaml, which is of another;"
        " compare with another spec by --spec"
    )


def test_check_of_every_package_is_one_document(built: Path) -> None:
    """Without --spec the document has a list of packages, however many there are."""
    assert document("build", "--check") == {
        "current": True,
        "packages": [{"package": "one", "spec": "one.yaml", "current": True, "diff": []}],
    }
    Path("two.yaml").write_text(SPEC.replace("name: one", "name: two"), encoding="utf-8")
    assert run("build", "--spec", "two.yaml", "--no-verify", "--quiet").exit_code == 0
    (built / "py.typed").unlink()
    found = document("build", "--check", status=1)
    assert found["current"] is False
    assert [(each["package"], each["diff"]) for each in found["packages"]] == [
        ("one", ["Only in rendered/one: py.typed"]),
        ("two", []),
    ]
    assert document("build", "--check", "--spec", "two.yaml") == {"spec": "two.yaml", "current": True, "diff": []}


def test_a_stale_package_is_built_by_the_command_that_is_told(spec: Path) -> None:
    """It has the spec, the database and the folder as they were given, quoted for a shell."""
    Path("my specs").mkdir()
    spec.rename("my specs/one.yaml")
    given = ("--spec", "my specs/one.yaml", "--no-db", "--out", "my packages")
    result = run("build", "--check", *given)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line == f"m2gen: one is stale; run `m2gen build {shlex.join(given)}`"


KERNEL = "compiled/triton-3.7.1/sm_90/module/m2rnn_step_kernel-0.json"


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``--compiled`` bring one file along, for the spec's one target."""

    def files(rendered: Package, arches: Iterable[str], progress: object) -> dict[str, str]:
        assert (rendered.name, list(arches)) == ("one", ["sm_90"])
        return {KERNEL: "{}\n"}

    monkeypatch.setattr(STAGE, "compiled_files", files)


@pytest.mark.usefixtures("brought")
def test_compiled_kernels_come_and_go_with_a_build(built: Path) -> None:
    """They are m2gen's files; a check renders none, since they depend on the toolchain; a build without has none."""
    assert run(*BUILD, "--compiled").exit_code == 0
    assert (built / KERNEL).read_text(encoding="utf-8") == "{}\n"
    assert KERNEL in listed_in(built)
    assert run("build", "--spec", "one.yaml", "--check").exit_code == 0
    (built / "op.py").write_text("edited\n", encoding="utf-8")
    assert run("build", "--spec", "one.yaml", "--check").exit_code == 1
    assert run(*BUILD).exit_code == 0
    assert not (built / "compiled").exists()


@pytest.mark.usefixtures("brought")
def test_a_check_sees_compiled_kernels_that_are_not_those_of_the_build(built: Path) -> None:
    """A file that was altered, that is missing, or that no build brought along makes a package stale."""
    assert run(*BUILD, "--compiled").exit_code == 0
    changes: list[tuple[Callable[[], object], str]] = [
        (lambda: (built / KERNEL).write_text("{ }\n", encoding="utf-8"), f"one/{KERNEL}: must have the hash that"),
        ((built / KERNEL).unlink, f"one/{KERNEL}: must have the hash that"),
        (
            lambda: (built / KERNEL).with_name("x-1.json").touch(),
            f"Only in committed/one: {Path(KERNEL).parent}/x-1.json",
        ),
    ]
    for change, said in changes:
        assert run(*BUILD, "--compiled").exit_code == 0
        assert run("build", "--spec", "one.yaml", "--check").exit_code == 0
        change()
        result = run("build", "--spec", "one.yaml", "--check")
        assert result.exit_code == 1
        assert said in result.stdout
        (built / KERNEL).with_name("x-1.json").unlink(missing_ok=True)


@pytest.mark.usefixtures("brought")
def test_wheels_have_compiled_kernels_when_asked(built: Path) -> None:
    """The wheel has another version than the one without, as it has other content."""
    for options in ((), ("--compiled",)):
        assert run(*BUILD, "--wheel", *options).exit_code == 0
    having = {f"one/{KERNEL}" in zipfile.ZipFile(wheel).namelist() for wheel in Path("dist").iterdir()}
    assert having == {False, True}


def test_build_check_takes_no_compiled(spec: Path) -> None:
    """A comparison of sources has nothing to compile."""
    assert fails(2, "build", "--spec", "one.yaml", "--check", "--compiled") == (
        "m2gen: build --check compares sources, and takes no --compiled"
    )
