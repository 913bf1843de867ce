"""Generated packages: the same bytes anywhere, clean and self-contained."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, SCHEDULES, build_package, make_variant, variants

from m2gen import pipeline
from m2gen.device import PORTABLE
from m2gen.errors import SpecError
from m2gen.package import emit
from m2gen.package.directory import MANIFEST, write
from m2gen.variant import BuiltVariant

OPENING = 12
"""Lines in which a file says what it comes from: a comment of a copied module, else a part of the docstring."""
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
    """Return the findings of the project's linter in generated code, with the project's exception for it."""
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
    """A package can be copied into any repository: relative imports, torch, triton and the standard library.

    What is for transformers imports that, too.
    """
    for path in written.rglob("*.py"):
        optional = {"transformers"} if path.parent.name in ("hf", "flame") else set()
        allowed = {"torch", "triton"} | optional | sys.stdlib_module_names
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
        opening = " ".join(line.removeprefix("# ") for line in text.splitlines()[:OPENING])
        assert "do not edit. Regenerate with `m2gen build --spec " in opening, path


def test_the_namespace_follows_the_content() -> None:
    """Two packages share a namespace only if their kernels are the same."""
    one, same, other = (
        build_package("p", [make_variant()], SCHEDULES[name])
        for name in ("one_level_atomic", "one_level_atomic", "two_level_atomic")
    )
    assert one.namespace == same.namespace != other.namespace


def test_bytes_decide_whether_a_package_is_current(tmp_path: Path) -> None:
    """A lost empty file, other line ends and a link are no package as it was built, and each is named in a line."""
    planned = pipeline.plan(TINY)
    package = pipeline.render(planned)
    files = {**package.files, MANIFEST: emit.manifest_text(package, {"toolchain": "of another day"})}
    folder = tmp_path / "tiny"
    write(folder, files)
    (folder / "py.typed").unlink()
    (folder / "op.py").write_bytes(files["op.py"].replace("\n", "\r\n").encode())
    (folder / "layer.py").write_bytes(files["layer.py"].rstrip("\n").encode())
    (folder / MANIFEST).write_bytes(files[MANIFEST].replace("\n", "\r\n").encode())
    (folder / "dispatch.py").rename(tmp_path / "dispatch.py")
    (folder / "dispatch.py").symlink_to(tmp_path / "dispatch.py")
    assert pipeline.difference(planned, tmp_path) == [
        "committed/tiny/MANIFEST.json: line ends differ",
        "committed/tiny/dispatch.py: must be a file, got a link",
        "committed/tiny/layer.py: line ends differ",
        "committed/tiny/op.py: line ends differ",
        "Only in rendered/tiny: py.typed",
    ]


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
    (tmp_path / "tiny" / "weights.bin").write_bytes(b"\xff\x00" * 50)
    (tmp_path / "tiny" / "notes.txt").write_text("x\n" * 50_000, encoding="utf-8")
    (tmp_path / "tiny" / "data").mkdir()
    (tmp_path / "tiny" / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "tiny" / ".git").mkdir()
    (tmp_path / "tiny" / ".git" / "HEAD").write_text("a repository is nothing of the package's", encoding="utf-8")
    lines = pipeline.difference(planned, tmp_path)
    assert {"-edited = True", "-stray", "+++ rendered/tiny/dispatch.py"} <= set(lines)
    named = {line.removeprefix("Only in committed/tiny: ") for line in lines if line.startswith("Only in")}
    assert named == {"weights.bin", "notes.txt", "data/", "link"}
    assert not any(".git" in line for line in lines)
    assert len(lines) < 1000


NAMED = """
schema: 1
name: named
targets: [sm_90]
layers:
  a: {head_dim: 16, state_expansion: 16, heads: {q: 1, k: 1, v: 2, f: 2, w: 2}, dtypes: [fp32]}
"""


@pytest.mark.parametrize("name", ['a"""b.yaml', "a\\udef.yaml", "caf\udce9.yaml", "a\nb.yaml"])
def test_names_of_specs_that_generated_code_cannot_state(tmp_path: Path, name: str) -> None:
    """Every generated file says which spec it is of."""
    (tmp_path / name).write_text(NAMED, encoding="utf-8")
    with pytest.raises(SpecError, match="must be a file whose name"):
        pipeline.plan(str(tmp_path / name), None, ())


def test_the_command_can_be_typed(tmp_path: Path) -> None:
    """Also where the spec's name has a space."""
    (tmp_path / "my spec.yaml").write_text(NAMED, encoding="utf-8")
    assert pipeline.plan(str(tmp_path / "my spec.yaml"), None, ()).origin.command == "m2gen build --spec 'my spec.yaml'"
