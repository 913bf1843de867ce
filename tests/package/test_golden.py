"""Rendered packages, byte for byte: a golden copy for the tests, and the ones that are committed for users."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support import GOLDEN, ROOT

from m2gen import pipeline

COMMITTED = sorted(path.parent.name for path in (ROOT / "generated").glob("*/MANIFEST.json"))
HINT = "; if the change is intended, run pytest --update-golden and read the diff"


def rendered(name: str) -> dict[str, str]:
    """Return the files that a shipped spec renders to."""
    return dict(pipeline.render(pipeline.plan(str(ROOT / "specs" / f"{name}.yaml"))).files)


def read(folder: Path) -> dict[str, str]:
    """Return the text of every file below a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes().decode() for path in paths}


def rewrite(folder: Path, files: dict[str, str]) -> None:
    """Make a folder hold exactly the given files."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(text.encode())


def test_golden(request: pytest.FixtureRequest) -> None:
    """Every file of the tiny package is what it was when last looked at."""
    files = rendered("tiny")
    if request.config.getoption("--update-golden"):
        rewrite(GOLDEN / "tiny", files)
    golden = read(GOLDEN / "tiny")
    assert sorted(golden) == sorted(files), f"other files{HINT}"
    for path, text in files.items():
        assert golden[path].splitlines() == text.splitlines(), f"{path} changed{HINT}"
        assert golden[path] == text


def test_updating_leaves_exactly_the_rendered_files(tmp_path: Path) -> None:
    """An update writes new files, and removes those that are rendered no more."""
    rewrite(tmp_path / "tiny", {"gone.py": "old", "kernels/gone.py": "old"})
    rewrite(tmp_path / "tiny", files := {"a.py": "a\n", "kernels/b.py": "b\n"})
    assert read(tmp_path / "tiny") == files


def test_some_packages_are_committed() -> None:
    """The packages that the documentation imports are there to be compared."""
    assert {"tiny", "h100"} <= set(COMMITTED)


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_packages_are_what_the_sources_render(name: str) -> None:
    """A template, schedule or spec never changes without the packages that it renders."""
    planned = pipeline.plan(str(ROOT / "specs" / f"{name}.yaml"))
    assert pipeline.difference(planned, ROOT / "generated") == [], f"run `{planned.origin.command}`"
