"""The documents: what they link to exists, commands have the options that they show, and the README stays short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from support import ROOT

from m2gen.cli.app import app

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("tuning_db/*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    ]
)
FILES = sorted([ROOT / "Dockerfile", *(ROOT / ".github").rglob("*.yml")])
"""Files that are no pages, and whose text has commands."""
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")  # of pages; pictures may be made after the text that shows them
COMMAND = re.compile(r"(?:^|[`/ ])m2gen ([a-z][^`\n]*)", re.MULTILINE)
OPTION = re.compile(r"--[a-z][a-z-]*")


def anchors(page: Path) -> set[str]:
    """Return the fragments that a page's headings make, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code(page: Path) -> Iterator[str]:
    """Yield the text of code blocks and code spans, continued lines joined and comments cut off."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    if page in FILES:
        yield text
        return
    yield from (block.group(1) for block in re.finditer(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    yield from re.findall(r"^ {4}(.*)$", text, re.MULTILINE)
    yield from re.findall(r"`[^`\n]+`", text)


def commands(page: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each command of m2gen that a page shows: its text, its words and its options."""
    for text in code(page):
        for found in COMMAND.findall(text):
            line = found.split(" #")[0].split(" && ")[0]
            words = re.match(r"[a-z]+(?: [a-z]+(?:-[a-z]+)*)*", line)
            assert words is not None
            yield line, words.group().split(), OPTION.findall(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file or folder of the repository, and a heading that it has."""
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, fragment = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not fragment or fragment in anchors(path), target


@pytest.mark.parametrize("page", [*PAGES, *FILES], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_the_options_that_pages_show(page: Path) -> None:
    """A command of m2gen that a document shows exists, with every long option that it is shown with."""
    for line, words, options in commands(page):
        command: Any = typer.main.get_command(app)
        while groups := getattr(command, "commands", None):
            assert words, f"m2gen {line}"
            assert words[0] in groups, f"m2gen {line}"
            command = groups[words.pop(0)]
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert set(options) <= {*known, "--help"}, f"m2gen {line}"


def test_every_page_is_reached_from_the_readme() -> None:
    """No page of docs/ is without a link from the README, or from the index of its folder."""
    reached = set()
    for page in (ROOT / "README.md", ROOT / "docs" / "README.md", ROOT / "docs" / "history" / "README.md"):
        targets = LINK.findall(page.read_text(encoding="utf-8"))
        reached |= {(page.parent / target.partition("#")[0]).resolve() for target in targets if "://" not in target}
    assert set((ROOT / "docs").rglob("*.md")) <= reached


def test_the_readme_is_short() -> None:
    """The README has at most 1,200 words."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200
