"""Pages of the site: whatever they tell a reader to type is run as it is shown, or says what it needs."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from pages import Block, Command, blocks, site, unfenced
from reader import CHECKPOINT, SHORTER, Reader, settled, shortened
from records import H100, VARIANT, environment, failed, winner
from snippets import HOLDS, PRESUMED, WITHOUT_GRADIENTS, tokenizer, working_in
from support import ROOT

import m2gen.pipeline  # noqa: F401  (fills sys.modules)
from m2gen.bucket import Bucket
from m2gen.db import Query, Reason, look_up
from m2gen.spec import Objective
from m2gen.spec.load import parse_spec

DOCS = ROOT / "docs"
KINDS = {"console", "dockerfile", "python", "text", "yaml"}
"""Kinds of blocks: commands of the first two, and ``text`` for what nobody types."""
TYPED = re.compile(r"^\W*(?:m2gen|python3?|pip|make|pytest|torchrun|srun)\b", re.MULTILINE)
NEEDED = re.compile(
    r"(a GPU|\d+ GPUs|hours of a CPU|another worker|a checkpoint|a contribution|a network|a search|PostgreSQL|Slurm)"
    r"\b.*"
)
"""What tests cannot have, as a remark names it."""
ELSEWHERE = {
    "docs/tutorial.md": "tests/release/test_distributions.py::test_the_tutorial_can_be_followed",
    "docs/training.md": "tests/test_train_examples.py::test_the_page_shows_what_is_tested",
    "examples/generate/README.md": "tests/test_examples.py::test_generate_smoke",
}
"""Pages whose commands and snippets other tests run."""
ON_RANKS = "from generated.h100.parallel import"
"""A line of the snippets that several ranks run together."""
NAME = re.compile(r"^name: (\w+)$", re.MULTILINE)
HEAD = "schema: 1\nname: shown\ntargets: [sm_90]\n"
"""What a spec has before its layers, where a page shows only these."""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Return a reader who did what the tutorial says; what builds compile is tested where the tutorial is followed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["m2gen.pipeline.build"], "check", lambda planned, progress: [])
        yield settled(tmp_path_factory.mktemp("reader"))


def write(block: Block, folder: Path) -> None:
    """Write the spec that a block is, where a page shows a whole one, and check it where it shows layers."""
    named = NAME.search(block.text)
    if "layers:" in block.text:
        parse_spec(block.text if "schema:" in block.text else HEAD + block.text, "shown.yaml")
        if named:
            (folder / f"{named[1]}.yaml").write_text(block.text, encoding="utf-8")


def same(command: Command, folder: Path, reader: Reader) -> None:
    """A command ends well, and what the page shows below it is what it prints; the installed Triton may be another."""
    said = reader.types(folder, command.text)
    assert said.status == 0, f"{command.text}: {said.text}"
    shown, printed = (re.sub(r"(?<=here )\d+\.\d+\.\d+", "", text) for text in (command.printed, said.text))
    assert shown.strip() in printed, f"{command.text}: {said.text}"


def runs(block: Block) -> bool:
    """Whether any machine can do what a block says: run a command or a snippet, or read a spec."""
    return bool(block.commands) or (block.kind in ("python", "yaml") and not block.needs)


PAGES = [name for name, text in site().items() if name not in ELSEWHERE and any(map(runs, blocks(text)))]
"""Pages with anything that is run here."""


@pytest.mark.parametrize("page", PAGES)
def test_pages_can_be_followed(page: str, reader: Reader, device, tmp_path: Path) -> None:
    """Each command that needs nothing ends well and each such snippet runs, in order, with what the text presumes."""
    folder = reader.folder(page)
    if page == "docs/models.md":
        tokenizer(folder / CHECKPOINT)
    names: dict[str, Any] = {"__name__": "page"}
    apart = []
    with working_in(reader.own), torch.set_grad_enabled(page not in WITHOUT_GRADIENTS):
        names |= PRESUMED[page](device) if page in PRESUMED else {}
        for block in blocks(site()[page]):
            if block.kind == "yaml":
                write(block, folder)
            for command in block.typed:
                if not command.needs:
                    same(command, folder, reader)
            if block.kind == "python" and not block.needs and ON_RANKS in block.text:
                apart.append(block.text)
            elif block.kind == "python" and not block.needs:
                exec(compile(block.text.replace('"cuda"', repr(device.type)), page, "exec"), names)
        if page in HOLDS:
            HOLDS[page](names)
        if apart:
            (tmp_path / "blocks.json").write_text(json.dumps(apart), encoding="utf-8")
            said = ranks.launch(ROOT / "tests" / "fakes" / "snippets_on_ranks.py", tmp_path, 4)
            assert said == dict.fromkeys(said, "")
            assert len(said) == len(apart)


@pytest.mark.parametrize("page", site())
def test_all_code_says_what_it_is(page: str) -> None:
    """Code is in blocks of a known kind, commands in a console's, and each that is not run says what it needs."""
    text = site()[page]
    assert unfenced(text) == []
    for block in blocks(text):
        assert block.kind in KINDS, block.text
        assert block.kind != "text" or not TYPED.search(block.text), block.text
        for needs in (block.needs, *(command.needs for command in block.typed)):
            assert not needs or NEEDED.fullmatch(needs), needs


@pytest.mark.parametrize("page", ELSEWHERE)
def test_tests_that_run_pages_are_there(page: str) -> None:
    """A page that is not followed here has commands or snippets that any machine can run, and a test that does."""
    assert any(map(runs, blocks(site()[page])))
    place, _, name = ELSEWHERE[page].partition("::")
    tree = ast.parse((ROOT / place).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_what_is_shortened_is_on_a_page() -> None:
    """No command is run shorter that no page has."""
    typed = {command for text in site().values() for block in blocks(text) for command in block.commands}
    assert set(SHORTER) <= typed
    assert all(shortened(command) != command for command in SHORTER)


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
