"""Blocks of a page as a reader would type them: files to write, and commands to run."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCED = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`([\w.-]+\.(?:py|ya?ml))`")
NEEDS = "# needs "
"""A command's remark that says what a machine must have for it, as ``# needs a GPU``; tests do not run it."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    text: str
    file: str
    """Name of the file that the sentence before the block says to put it into; empty if it says none."""

    @property
    def commands(self) -> list[str]:
        """The commands that any machine can run, as a shell takes them."""
        lines = [line[2:] for line in self.text.splitlines() if line.startswith("$ ")]
        return [line.split("  #")[0].strip() for line in lines if NEEDS not in line]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    for found in FENCED.finditer(text):
        sentence = text[: found.start()].rstrip().rpartition("\n\n")[2]
        named = FILE.findall(sentence) if sentence.endswith(":") and " into `" in sentence else []
        yield Block(found[2], textwrap.dedent(found[3]), named[0] if named else "")
