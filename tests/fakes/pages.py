"""Blocks of a page as a reader would type them: files to write, commands to run, and code."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from support import ROOT

from m2gen.kernels.compile import load_module

FENCED = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
DIRECTIVE = re.compile(r"^::: .*\n(?: {4}.*\n)*", re.MULTILINE)
"""What mkdocstrings puts a docstring in place of, with its options."""
FILE = re.compile(r"`([\w.-]+\.(?:py|ya?ml))`")
NAVIGATED = re.compile(r"([\w./-]+\.md)$", re.MULTILINE)
NEEDS = "needs "
"""Begins a remark that says what a machine must have, as ``# needs a GPU``; tests do not run what has one."""
PROMPTS = {"console": "$ ", "dockerfile": "RUN "}
"""What a command begins with, by the kind of its block."""


@dataclass(frozen=True)
class Command:
    """A command of a page, as a shell takes it."""

    text: str
    needs: str
    """What its remark says that it needs; empty if any machine can run it."""
    printed: str
    """The lines that the page shows below it."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    text: str
    file: str
    """Name of the file that the sentence before the block says to put it into; empty if it says none."""

    @property
    def typed(self) -> list[Command]:
        """All commands, each with its continued lines."""
        prompt = PROMPTS.get(self.kind)
        if prompt is None:
            return []
        parts = re.split(rf"^{re.escape(prompt)}", self.text.replace("\\\n", "\0"), flags=re.MULTILINE)
        return [_command(part) for part in parts[1:]]

    @property
    def commands(self) -> list[str]:
        """The commands that any machine can run."""
        return [command.text for command in self.typed if not command.needs]

    @property
    def needs(self) -> str:
        """What the remark in the first line of code says that it needs; empty if any machine can run it."""
        first = self.text.partition("\n")[0]
        return _needs(first.removeprefix("# ")) if first.startswith("# ") else ""


def _command(part: str) -> Command:
    line, _, printed = part.partition("\n")
    text, _, remark = line.partition(" # ")
    return Command(re.sub(r"\s*\0\s*", " ", text).strip(), _needs(remark.strip()), printed)


def _needs(remark: str) -> str:
    return remark.removeprefix(NEEDS) if remark.startswith(NEEDS) else ""


def blocks(text: str) -> Iterator[Block]:
    """Yield the blocks of a page in order."""
    for found in FENCED.finditer(text):
        sentence = text[: found.start()].rstrip().rpartition("\n\n")[2]
        named = FILE.findall(sentence) if sentence.endswith(":") and " into `" in sentence else []
        yield Block(found[2], textwrap.dedent(found[3]), named[0] if named else "")


def unfenced(text: str) -> list[str]:
    """Return the lines of a page that are code by their indentation alone, or begin a block that says no kind."""
    left = DIRECTIVE.sub("", FENCED.sub("", text))
    return re.findall(r"^ {4,}\S.*$|^ *```.*$", left, re.MULTILINE)


@cache
def site() -> dict[str, str]:
    """Return the text of the README and of every page of the navigation, by its path in the repository.

    Pages that are made from the program have their path on the site.
    """
    before = list(sys.path)
    made = load_module(ROOT / "tools" / "site_pages.py", "m2gen_test_pages_of_the_site")
    sys.path[:] = before  # the module looks for one beside it
    places = {place: path for path, place in made.OUTSIDE.items()}
    reference = made.site_reference.pages()
    texts = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    for name in NAVIGATED.findall((ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]):
        path = places.get(name, f"docs/{name}")
        texts[path] = reference[name] if name in reference else (ROOT / path).read_text(encoding="utf-8")
    return texts
