"""Packages on disk: the same bytes anywhere, clean, self-contained, and never half written."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT, SCHEDULES, build_package, make_variant, variants

from m2gen import pipeline
from m2gen.device import PORTABLE
from m2gen.errors import EmitError
from m2gen.package import emit
from m2gen.package.write import MANIFEST, write
from m2gen.variant import BuiltVariant

TINY = str(ROOT / "specs" / "tiny.yaml")
RENDER = """
import hashlib, json, sys
from m2gen import pipeline
from m2gen.package import emit
package = pipeline.render(pipeline.plan(sys.argv[1]))
text = json.dumps(dict(package.files)) + emit.manifest_text(package, {})
print(package.namespace, package.content_hash, hashlib.sha256(text.encode()).hexdigest())
"""


def _render_in(folder: Path, seed: str) -> str:
    """Return the hashes of the tiny package rendered by a process in another folder with another hash seed."""
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RENDER, TINY]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def test_two_renders_anywhere_are_byte_identical(tmp_path: Path) -> None:
    """Neither the folder nor the order of hashes shows in a package."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = _render_in(tmp_path / "a", "1")
    assert first == _render_in(tmp_path / "b", "2")
    assert first.startswith("m2gen_tiny_")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of packages in every schedule and both clip modes, written to disk."""
    root = tmp_path_factory.mktemp("written")
    for index, (schedule, clip) in enumerate(zip(SCHEDULES.values(), ("carry", "total") * 2, strict=True)):
        package = build_package(f"p{index}", variants(clip), schedule)
        write(root / package.name, {**package.files, MANIFEST: emit.manifest_text(package, {})})
    return root


def _lint(folder: Path) -> str:
    """Return what the project's linter says of generated code, with the exception that the project makes for it."""
    config = str(ROOT / "pyproject.toml")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--ignore", "SIM102", "--config", config]
    command += ["--output-format", "concise", "--quiet", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_generated_code_passes_the_projects_linter(written: Path) -> None:
    """Whatever the schedule, generated code is as clean as the project's own."""
    assert _lint(written) == ""


def test_long_names_pass_the_projects_linter(tmp_path: Path) -> None:
    """The longest names that a spec may give, and a variant that many layers need, keep lines within the limit."""
    built = BuiltVariant(make_variant(), tuple(f"layer_{i}_{'x' * 40}" for i in range(5)))
    origin = emit.Origin("n" * 64, "n" * 64 + ".yaml", "0" * 12)
    package = emit.package(origin, [emit.Choice(built, PORTABLE, SCHEDULES["one_level_atomic"])])
    write(tmp_path / "p", package.files)
    assert _lint(tmp_path) == ""


def test_generated_code_imports_only_torch_and_triton(written: Path) -> None:
    """A package can be copied into any repository: relative imports, torch, triton and the standard library."""
    allowed = {"torch", "triton"} | sys.stdlib_module_names
    for path in written.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert str(node.module).split(".")[0] in allowed, path


def test_generated_code_leaves_no_trace_of_templates(written: Path) -> None:
    """No template syntax, path of this machine or empty condition survives, and every file opens with its origin."""
    for path in written.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not any(trace in text for trace in ("{%", "%}", "{#", str(ROOT), str(Path.home()) + "/")), path
        assert "do not edit. Regenerate with `m2gen build --spec " in str(ast.get_docstring(ast.parse(text)))


def test_the_namespace_follows_the_content() -> None:
    """Two packages share a namespace only if their kernels are the same."""
    one, same, other = (
        build_package("p", [make_variant()], SCHEDULES[name])
        for name in ("one_level_atomic", "one_level_atomic", "two_level_atomic")
    )
    assert one.namespace == same.namespace != other.namespace


def _complete(folder: Path) -> str:
    """Return the manifest's version after checking that exactly the files it lists are there, as it lists them."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    del found[MANIFEST]
    assert {path: hashlib.sha256(text).hexdigest()[:16] for path, text in found.items()} == manifest["files"]
    return str(manifest["version"])


WRITE_FOREVER = """
import hashlib, json, sys
from pathlib import Path
from m2gen.package.write import MANIFEST, write
version = 0
while True:
    files = {f"kernels/{i}.py": f"{version} {i} " * 500 for i in range(6 + version % 3)}
    hashes = {path: hashlib.sha256(text.encode()).hexdigest()[:16] for path, text in files.items()}
    write(Path(sys.argv[1]), {**files, MANIFEST: json.dumps({"version": version, "files": hashes})})
    if version == 0:
        print("started", flush=True)
    version += 1
"""


def test_a_kill_leaves_the_old_package_or_the_new(tmp_path: Path) -> None:
    """Killed at any moment, a writer leaves one complete package, and the next writer is not in its way."""
    folder, rng, versions = tmp_path / "package", random.Random(0), []
    for _ in range(10):
        command = [sys.executable, "-c", WRITE_FOREVER, str(folder)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
        versions.append(_complete(folder))
    assert max(map(int, versions)) > 0


def _package_files(mark: str) -> dict[str, str]:
    return {"__init__.py": mark, "kernels/a.py": mark, MANIFEST: "{}"}


def test_writing_replaces_everything(tmp_path: Path) -> None:
    """Files that the new package does not have are gone, and nothing else lies about."""
    write(tmp_path / "p", _package_files("old") | {"kernels/gone.py": "old"})
    write(tmp_path / "p", _package_files("new"))
    assert sorted(path.name for path in tmp_path.rglob("*.py")) == ["__init__.py", "a.py"]
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("place", ["p", "deep/er/p"])
def test_a_folder_that_is_no_package_is_refused(tmp_path: Path, place: str) -> None:
    """Somebody's own files are never replaced, while absent and empty folders are filled."""
    folder = tmp_path / place
    folder.mkdir(parents=True)
    write(folder, _package_files("new"))
    (folder / MANIFEST).unlink()
    with pytest.raises(EmitError, match=r"must be absent, empty or a generated package"):
        write(folder, _package_files("newer"))
    assert (folder / "__init__.py").read_text(encoding="utf-8") == "new"


def test_a_file_in_the_packages_place_is_refused(tmp_path: Path) -> None:
    """A plain file where the package should go is an error in one line, and stays."""
    (tmp_path / "p").write_text("mine", encoding="utf-8")
    with pytest.raises(EmitError, match="p must be"):
        write(tmp_path / "p", _package_files("new"))
    assert (tmp_path / "p").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("place", ["file/p", "file/deep/p"])
def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path, place: str) -> None:
    """An output folder below a plain file, which not even root can make, is an EmitError."""
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(EmitError, match="must be writable"):
        write(tmp_path / place, _package_files("new"))


def test_a_failure_half_way_leaves_the_old_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full after the first file leaves what was there, and no remains."""
    write(tmp_path / "p", _package_files("old"))
    calls: list[int] = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EmitError, match="No space left on device"):
        write(tmp_path / "p", _package_files("new"))
    assert (tmp_path / "p" / "__init__.py").read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_an_edit_and_a_stray_file_are_found(tmp_path: Path) -> None:
    """The comparison with a package on disk shows edits, strays and losses as a diff, and no resources."""
    planned = pipeline.plan(TINY)
    package = pipeline.render(planned)
    files = {**package.files, MANIFEST: emit.manifest_text(package, {"toolchain": "of another day"})}
    write(tmp_path / "tiny", files)
    assert pipeline.difference(planned, tmp_path) == []
    (tmp_path / "tiny" / "op.py").write_text(files["op.py"] + "edited = True\n", encoding="utf-8")
    (tmp_path / "tiny" / "stray.txt").write_text("stray\n", encoding="utf-8")
    (tmp_path / "tiny" / "dispatch.py").unlink()
    lines = pipeline.difference(planned, tmp_path)
    assert {"-edited = True", "-stray", "+++ rendered/tiny/dispatch.py"} <= set(lines)
