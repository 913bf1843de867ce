"""Pages that a stranger follows: how-to pages, whose files and commands are typed as they are shown."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from pages import NEEDS, blocks
from records import H100, VARIANT, environment, failed, winner
from support import ROOT

from m2gen.bucket import Bucket
from m2gen.db import Query, Reason, look_up
from m2gen.spec import Objective

DOCS = ROOT / "docs"
TUTORIAL = DOCS / "tutorial.md"
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
ONE_CASE = ("--case", "ragged")
"""What a verification is shortened to: all of it is run where a workflow's commands are."""
NAME = re.compile(r"^name: (\w+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with the tutorial's package, in which how-to pages go on."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        spec = next(block for block in blocks(TUTORIAL) if block.file == "toy.yaml")
        (folder / "toy.yaml").write_text(spec.text, encoding="utf-8")
        assert run("build", "--spec", "toy.yaml", "--no-verify", "--quiet").exit_code == 0
        yield folder


def follow(page: Path, folder: Path) -> Iterator[tuple[str, Any]]:
    """Write the files of a page, run its Python, and yield each command with its result; not what has marked needs."""
    for block in blocks(page):
        named = NAME.search(block.text)
        if block.kind == "yaml" and named:
            (folder / f"{named[1]}.yaml").write_text(block.text, encoding="utf-8")
        if block.kind == "python" and NEEDS not in block.text.partition("\n")[0]:
            variables = {**os.environ, "PYTHONPATH": f".{os.pathsep}{ROOT}"}
            subprocess.run([sys.executable, "-c", block.text], cwd=folder, env=variables, check=True)
        for command in block.commands:
            program, *arguments = shlex.split(command)
            assert program == "m2gen", command
            yield command, run(*arguments, *(ONE_CASE if arguments[0] == "verify" else ()))


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_how_to_pages_can_be_followed(page: Path, place: Path) -> None:
    """Each command ends well in the reader's folder, and each needs nothing but what the page says."""
    for command, result in follow(page, place):
        assert result.exit_code == 0, f"{command}: {result.output}"


@pytest.mark.parametrize("page", [TUTORIAL, *HOW_TO], ids=lambda page: page.stem)
def test_what_tests_leave_out_says_why(page: Path) -> None:
    """A command that is not run needs a GPU, several workers or a checkpoint, and says so."""
    for block in blocks(page):
        left_out = [line for line in block.text.splitlines() if line.startswith("$ ") and NEEDS in line]
        for line in left_out:
            assert re.search(r"# needs (a GPU|\d+ GPUs|another worker|a checkpoint|a contribution)", line), line


QUERY = Query(VARIANT.key, Objective.TRAIN, "sm_90", "NVIDIA H200", Bucket.FOUR)
BEST = winner(high=0.5)
INFER = replace(
    winner(), key=replace(winner().key, objective=Objective.INFER), timing=replace(winner().timing, backward_ms=None)
)
FAILING = winner(high=0.4, seed=1)
UNUSED = {
    "arch": [winner(where=environment("NVIDIA A100", "sm_80"))],
    "failure": [failed(Reason.WRONG)],
    "objective": [INFER],
    "kernels": [replace(winner(), provenance=replace(winner().provenance, kernel="0" * 12))],
    "policy": [replace(winner(), key=replace(winner().key, policy="other"))],
    "verdict": [FAILING, replace(FAILING, timing=None, errors=(), failure=failed().failure)],
    "device": [winner(where=environment(H100))],
    "bucket": [winner(Bucket.ONE)],
    "toolchain": [winner(where=environment(triton="3.5.0"))],
    "slower": [winner(high=0.8)],
    "tie": [replace(BEST, provenance=replace(BEST.provenance, seed=9))],
}


@pytest.mark.parametrize("records", UNUSED.values(), ids=UNUSED.keys())
def test_every_reason_against_a_record_is_on_the_page(records: list[Any]) -> None:
    """What ``m2gen db why`` can say of a record begins as a row of the page does."""
    text = (DOCS / "database.md").read_text(encoding="utf-8").partition("## Why is my record not used")[2]
    rows = [found.partition("...")[0] for found in re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)]
    others = [] if records == UNUSED["verdict"] else [BEST]
    rejected = look_up([*others, *records], QUERY).rejected
    assert rejected
    for found in rejected:
        begin = re.split(r"\d|\bother\b", found.reason)[0]
        assert any(row.startswith(begin) or found.reason.startswith(row) for row in rows), found.reason


def test_the_space_on_the_page_is_what_the_command_prints() -> None:
    """The example of ``m2gen tune --dry-run`` is of the space as it is; candidates, which follow it, are left out."""
    text = (DOCS / "tuning.md").read_text(encoding="utf-8")
    shown = re.search(
        r"^\$ m2gen (tune --spec h200.yaml --layer .* --target sm_90)\n(m2rnn_410m[^`]*)```", text, re.MULTILINE
    )
    assert shown is not None
    printed = run(*shlex.split(shown[1])).stdout
    assert printed.startswith(shown[2]), printed


@pytest.mark.parametrize("page", ["database.md", "build.md"])
def test_records_that_examples_name_are_shipped(page: str) -> None:
    """Whoever types an example's id finds that record in the shipped database."""
    files = (ROOT / "tuning_db").rglob("*.jsonl")
    shipped = [json.loads(line)["id"] for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    text = (DOCS / page).read_text(encoding="utf-8")
    named = re.findall(r"(?:db (?:show|replay)|exact|nearest) ([0-9a-f]{6,12})\b", text)
    assert named
    for begin in named:
        assert sum(each.startswith(begin) for each in shipped) == 1, begin


def test_the_package_on_the_page_is_the_committed_one() -> None:
    """The line that ends a build counts the variants and files that the committed package has."""
    shown = re.search(r"(\d+) variants, (\d+) files, verified on", (DOCS / "build.md").read_text(encoding="utf-8"))
    assert shown is not None
    package = ROOT / "generated" / "h100"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    manifest = json.loads((package / "MANIFEST.json").read_text(encoding="utf-8"))
    assert (int(shown[1]), int(shown[2])) == (len(manifest["variants"]), len(files))
